"""AdamW for weights of any dtype, with 32-, 16- or 8-bit states."""
