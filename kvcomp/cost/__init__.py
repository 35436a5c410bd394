"""What a stack costs before any run: bytes held, bytes read, time on a device."""
