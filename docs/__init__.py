"""The pages of the site, and in `draw` what makes their pictures."""
