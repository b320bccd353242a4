"""Face images from disk to uint8 batches: folders, image pairs, drawn faces, the order of samples, augmentation."""
