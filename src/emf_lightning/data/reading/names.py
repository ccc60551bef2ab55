"""Names of columns and JSON keys in published caption-image data."""

CAPTIONS = ("caption", "prompt", "text", "txt", "instruction", "input_prompt")
IMAGES = ("output_image", "image_path", "image", "file_name")
"""Names for a caption and for its image."""
