"""Speed and accuracy measurements; results/ is written by them."""
