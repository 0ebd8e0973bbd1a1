"""Data that ships with the package: Online Retail, CC BY 4.0, Chen, D. (2015), UCI, doi 10.24432/C5BW33."""
