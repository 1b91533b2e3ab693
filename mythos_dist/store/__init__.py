"""Reading files in object stores and on servers, by URL."""
