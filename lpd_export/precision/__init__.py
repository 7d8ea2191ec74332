"""From FP32 graphs to those of a precision: measured, decided, written."""
