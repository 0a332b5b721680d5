"""Networks: recognisers, and the small one that scores the quality of an image."""
