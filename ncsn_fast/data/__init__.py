"""Image input and output: data sets, loaders, PNG files, atomic writes."""
