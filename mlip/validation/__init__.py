"""Physical properties of crystals under any ASE calculator, and the plots that show them."""
