"""Quality of generated pictures and clips: samples against a reference, by features of a frozen network."""
