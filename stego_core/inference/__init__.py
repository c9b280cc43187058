"""From images to label maps: prediction and CRF refinement."""
