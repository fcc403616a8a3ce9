"""ldrt-edge: a vision-language assistant for low-dose radiation therapy, from fine-tune to clinic laptop."""

__version__ = "0.1.0"
