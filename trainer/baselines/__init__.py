"""What the product is compared with. Nothing here is served; every class is an `evaluation.ranker.Ranker`."""
