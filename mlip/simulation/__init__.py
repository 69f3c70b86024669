"""Use a potential: ASE calculator, relaxation, molecular dynamics, prediction and evaluation."""
