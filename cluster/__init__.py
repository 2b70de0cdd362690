"""The machines: devices, ports, rank tables and the msrun command line. Facts in, text out."""
