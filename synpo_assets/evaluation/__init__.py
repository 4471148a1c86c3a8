"""What is measured of M_t, and whether it is promoted."""
