"""The main job: train the arms side by side, and write the comparison as tables, a figure and a page."""
