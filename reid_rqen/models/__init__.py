"""Networks: trunks, region pooling, quality heads and the models made of them."""
