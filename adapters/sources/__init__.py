"""Where adapters come from besides local folders: the Hugging Face hub, S3, Google Cloud Storage and HTTP servers."""
