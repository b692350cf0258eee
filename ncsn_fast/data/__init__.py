"""Images in and out: data sets, loaders, PNG files, atomic writes."""
