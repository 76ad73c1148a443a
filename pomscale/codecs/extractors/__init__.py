"""Networks that turn pictures and clips into features for metrics; teachers of representation alignment are among them."""
