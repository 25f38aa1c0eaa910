"""Files and data sets → RGB pictures with captions."""
