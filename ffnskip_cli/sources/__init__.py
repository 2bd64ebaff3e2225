"""Where models and text come from: the Hub, local files, the demo."""
