"""The main job: train the arms side by side, and write what they show as tables, a figure and a page."""
