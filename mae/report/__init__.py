"""What a person looks at: pictures, curves and one self-contained page per run."""
