"""Model card templates and the code that fills them."""
