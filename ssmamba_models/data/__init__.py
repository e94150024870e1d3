"""Tiles and what is made of them: folders of images, feature files, synthetic H&E."""
