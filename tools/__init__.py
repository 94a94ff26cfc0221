"""What makes files that ship with emonb, and measurements of it; not installed. See README.md."""
