"""Files in object stores and on servers, by URL: read, and on s3:// and file:// also written."""
