"""Files of other formats than Parquet as record batches of bounded size, one module a format."""
