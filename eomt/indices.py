"""Values of a label map: train indices 0..K-1, and two values for pixels of no class."""

IGNORE = 255  # pixels that neither train nor count
OUTLIER = 254  # pixels of an object that belongs to no class; they train outlier losses, and nothing else
OUTLIER_COLOR = (0, 255, 255)
MAX_CLASSES = 254  # the last two values of a uint8 label map are OUTLIER and IGNORE
