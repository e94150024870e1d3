"""Tiles and what is made of them: folders of images, feature files (ours and other tools'), bags, synthetic H&E."""
