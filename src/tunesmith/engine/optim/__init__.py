"""AdamW over weights of any dtype, with states as small as asked for."""
