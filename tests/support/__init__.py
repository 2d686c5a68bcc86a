"""Things several rooms' tests are made of."""
