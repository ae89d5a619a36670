"""What a stage reached on data it was not trained on."""
