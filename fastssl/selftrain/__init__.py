"""Self-training: a teacher scores a pool of images, the best of each class become a student's training set."""
