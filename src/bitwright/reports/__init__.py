"""The HTML report; never imports torch."""
