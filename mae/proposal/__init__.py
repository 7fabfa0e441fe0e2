"""First settings for new images: facts about the images and the machine, and rules that turn them into settings."""
