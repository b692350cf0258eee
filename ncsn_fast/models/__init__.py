"""Networks: NCSN, NCSNv2, the score-SDE tutorial's U-Net, and the Inception network of the FID."""
