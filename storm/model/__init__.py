"""The three levels of the model (morphology, profile, space) and its heads; knows no rank and no loss."""
