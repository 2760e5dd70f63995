"""The Wallaroo model in plain torch: it knows nothing of Ray, Arrow, S3 or manifests."""
