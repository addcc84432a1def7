"""Break the code on purpose and see a test go red: `python -m tests.mutations --only fista`.

A mutation is what a slip of the hand would be where a wrong answer would not be noticed: a sign, a factor, an axis, a state
that is dropped, a count that is off by one. Each is made in a copy of the tree, never in the checkout.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import pytest

ROOT = Path(__file__).parent.parent
APART = shutil.ignore_patterns(".venv", ".git", ".hypothesis", "runs", "__pycache__", ".*_cache")
SECONDS = 900
"""A test that hangs has seen the mutation too."""


@dataclass(frozen=True)
class Mutation:
    """file: from unroll/.  old occurs in it once; new takes its place.  tests: below tests/, those that ought to see it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    # calculus
    Mutation("product rule, factors in their order", "calculus/gradient.py", "map(transpose, reversed(factors[i + 1 :]))", "map(transpose, factors[i + 1 :])", "calculus/test_gradient.py"),
    Mutation("sphere, its slope below eps", "calculus/gradient.py", "slot(1) > node.eps", "slot(1) >= 0", "calculus/test_gradient.py laws/test_corners.py"),
    Mutation("max, the slope at a tie", "calculus/gradient.py", "sp.Ge(first, other)", "sp.Gt(first, other)", "calculus/test_gradient.py::test_what_is_cut_off_has_slope_0_at_its_border"),
    Mutation("0 log 0, its slope", "calculus/gradient.py", "m * top / (bottom + sp.Piecewise((1, both), (0, True)))", "m * top / bottom", "calculus/test_stable.py"),
    Mutation("difference, no sign is known of it", "calculus/cones.py", 'case Op(name, x) if name != "difference":', "case Op(name, x):", "calculus/test_cones.py"),
    Mutation("definite, one term that is not", "calculus/cones.py", "return 0 if 0 in grades else max(grades)", "return max(grades)", "calculus/test_cones.py"),
    Mutation("log-sum-exp, half the norm squared", "calculus/curvature.py", "sp.Rational(1, 2), _square(norm)", "sp.Rational(1, 4), _square(norm)", "calculus/test_curvature.py::test_the_bound_of_a_log_sum_exp_is_met_where_two_are_the_largest"),
    Mutation("difference, its norm", "calculus/curvature.py", "scale(2, inner)", "inner", "calculus/test_curvature.py::test_norms_of_affine_maps_bound_their_jacobians"),
    Mutation("sum, its norm", "calculus/curvature.py", "scale(sp.sqrt(count), inner)", "inner", "calculus/test_curvature.py::test_norms_of_affine_maps_bound_their_jacobians"),
    Mutation("repetition, its norm", "calculus/curvature.py", "scale(sp.sqrt(sp.Mul(*sizes)), inner)", "inner", "calculus/test_curvature.py::test_norms_of_affine_maps_bound_their_jacobians"),
    Mutation("broadcast, its norm", "calculus/curvature.py", "scale(sp.sqrt(_repeats(e, i)), times(inner, largest(weights)))", "times(inner, largest(weights))", "calculus/test_curvature.py::test_norms_of_affine_maps_bound_their_jacobians"),
    Mutation("Lipschitz, where it bends down more than up", "calculus/curvature.py", "elementwise(sp.Max(slot(0), -slot(1)), self.high, self.low)", "self.high", "calculus/test_curvature.py::test_hessians_lie_within_the_stated_bounds"),
    Mutation("quadratic of no sign, bounded below", "calculus/curvature.py", "else:\n            low.append(scale(-1, size))", "else:\n            low.append(NOTHING)", "calculus/test_curvature.py::test_hessians_lie_within_the_stated_bounds"),
    Mutation("trace, its norm", "calculus/curvature.py", "scale(sp.sqrt(x.rows), inner)", "inner", "calculus/test_curvature.py::test_norms_of_affine_maps_bound_their_jacobians"),
    Mutation("a number read in each entry, how often", "calculus/curvature.py", "norm = scale(sp.sqrt(_repeats(e, i)), norm)", "norm = scale(1, norm)", "calculus/test_curvature.py"),
    Mutation("convex together, whatever the mixture", "calculus/curvature.py", "if ratio is None or any(ratio.has(slot(j)) for j in moving):", "if ratio is None:", "calculus/test_curvature.py"),
    Mutation("one equation, what all entries share", "calculus/prox.py", "if as_constant(a) == 1 and not at_most:", "if False:", "calculus/test_one_equation.py"),
    Mutation("one equation, a sum that may be less", "calculus/prox.py", "(sp.Max(0, slot(2)) if at_most else slot(2))", "slot(2)", "calculus/test_one_equation.py"),
    Mutation("sorted magnitudes, pooled", "calculus/prox.py", 'project("sorted_l1", at, scale(_learned(number, swaps), w))', 'project("sorted_l1", at, scale(number * 2, w))', "calculus/test_sorted.py"),
    Mutation("controller, a size that is 0", "derivation/control.py", "transform(e, _divided)", "e", "derivation/test_control.py"),
    Mutation("ridge, the point is shrunk too", "calculus/prox.py", "t / (1 + t * ridge), scale(1 / (1 + t * ridge), at)", "t / (1 + t * ridge), at", "calculus/test_prox_matrix.py::test_no_point_near_it_is_better_than_the_prox"),
    Mutation("largest entry, the step in its radius", "calculus/prox.py", "radius, turned = _learned(t * c, swaps)", "radius, turned = _learned(c, swaps)", "calculus/test_prox_matrix.py::test_no_point_near_it_is_better_than_the_prox"),
    Mutation("rotated prox, its shift", "calculus/prox.py", "(c, profile, m, scale(1 / k, rest))", "(c, profile, m, rest)", "calculus/test_prox_matrix.py::test_no_point_near_it_is_better_than_the_prox"),
    Mutation("linear system, the step before its right side", "calculus/prox.py", "add(at, scale(-t, b))", "add(at, scale(-1, b))", "calculus/test_prox_matrix.py::test_no_point_near_it_is_better_than_the_prox"),
    Mutation("prox of a length, its shift", "calculus/prox.py", "shift = zeros(*z.shape) if rest is None else scale(1 / k, rest)", "shift = zeros(*z.shape) if rest is None else rest", "calculus/test_prox_matrix.py::test_no_point_near_it_is_better_than_the_prox"),
    Mutation("even prox, the tie at 0", "calculus/prox_scalar.py", "return all(r.proof != ", "return True or all(r.proof != ", "calculus/test_prox_scalar.py::test_the_prox_of_zero_is_the_limit_from_the_right_where_zero_is_a_peak calculus/test_prox_scalar.py::test_where_an_even_profile_is_smooth_at_zero_so_is_its_prox"),
    Mutation("bracket, weakly convex", "calculus/roots.py", "sp.Max(gap / floor, 0)", "sp.Max(gap, 0)", "calculus/test_prox_scalar.py::test_a_bracket_is_as_wide_as_weak_convexity_needs"),
    Mutation("prox, the slope in its scalars", "calculus/prox_source.py", "_neat(-sp.diff(p.G, s)", "_neat(sp.diff(p.G, s)", "calculus/test_prox_scalar.py::test_gradients_are_finite_differences"),
    Mutation("prox, no slope at a breakpoint", "calculus/prox_source.py", "text(at_knot(knot))) if knot.flat else after", "text(values[i])) if knot.flat else after", "calculus/test_prox_scalar.py::test_gradients_are_finite_differences"),
    Mutation("curvature, a kink downward", "calculus/scalar.py", "mu = -sp.oo if min(jumps, default=0) < 0 else mu", "mu = mu", "calculus/test_curvature_scalar.py"),
    Mutation("sums of exponentials, differences", "calculus/stable.py", "(sp.expand(_log_sum(up) - _log_sum(down)) / 2)", "(sp.expand(_log_sum(up) - _log_sum(down)))", "calculus/test_stable.py"),
    Mutation("logaddexp, its slope", "calculus/stable.py", "self.args if argindex == 1 else self.args[::-1]", "self.args", "calculus/test_stable.py::test_slopes_of_stable_primitives_are_those_of_what_they_mean"),
    Mutation("cubic root, without Newton", "calculus/torch_functions.py", "for _ in range(3):  # Newton", "for _ in range(0):  # Newton", "calculus/test_runtime.py::test_the_only_cubic_root_is_right_to_its_last_digits"),
    Mutation("Wright's omega, fewer steps", "calculus/torch_functions.py", "for _ in range(7):", "for _ in range(4):", "calculus/test_runtime.py"),
    # derivation
    Mutation("fista, Chambolle's count", "../specs/algorithms/fista.yaml", "layer / (layer + a + 1)", "layer / (layer + a)", "derivation/test_algorithms.py::test_fista_is_the_algorithm_of_the_paper"),
    Mutation("fista, weights at the extrapolated point", "derivation/reading.py", "substitute(w, {p.variable: self.at})", "substitute(w, {p.variable: self.running[self.argument]})", "derivation/test_held.py derivation/test_algorithms.py"),
    Mutation("a step that an input makes infinite", "derivation/known.py", "return cast(sp.Expr, nonzero(target)) if moving else target", "return target", "network/test_steps_of_inputs.py"),
    Mutation("ADMM, the sign of its duals", "../specs/algorithms/admm.yaml", "u[j]: v[j] - w[j]", "u[j]: w[j] - v[j]", "derivation/test_algorithm_texts.py"),
    Mutation("primal-dual, no extrapolation", "../specs/algorithms/chambolle_pock.yaml", "q: 2 * z_next - z", "q: z_next", "derivation/test_algorithm_texts.py"),
    Mutation("Condat and Vu, twice the constant", "../specs/algorithms/condat_vu.yaml", "tau: {start: 1 / (L(h) / 2 + sigma", "tau: {start: 1 / (L(h) + sigma", "derivation/test_algorithm_texts.py"),
    Mutation("Moreau, the step of the conjugate", "derivation/operations.py", "r.reading.prox(share, 1 / t, scale(1 / t, v))", "r.reading.prox(share, t, scale(1 / t, v))", "derivation/test_algorithm_texts.py"),
    Mutation("a composite term, its shift", "calculus/linear.py", "substitute(e, {x: add(w, b)})", "substitute(e, {x: w})", "derivation/test_algorithm_texts.py"),
    Mutation("norm of an operator, half of the square", "calculus/linear.py", "scale(sp.Rational(1, 2), _sumsq(k.e))", "_sumsq(k.e)", "derivation/test_algorithm_texts.py"),
    Mutation("argmin, the sign of what it solves", "calculus/linear.py", "matmul(inverse(left), scale(-1, b))", "matmul(inverse(left), b)", "derivation/test_algorithm_texts.py"),
    Mutation("what lives for one layer, read after a change", "derivation/reading.py", "if moved & reads:", "if False:", "derivation/test_algorithm_texts.py"),
    Mutation("last, what it is now", "derivation/operations.py", 'return cast(Value, reading.last[name])', "return now", "derivation/test_algorithm_texts.py"),
    Mutation("derived at another point, through what stands above", "derivation/formulas.py", "value = substitute(value, {a.target: a.value})", "pass", "derivation/test_algorithm_texts.py"),
    Mutation("blocks, what moves with the variable", "derivation/blocks.py", "if goes_on and (still or s.start is not inner or not isinstance(s.symbol, Sym)):", "if goes_on:", "derivation/test_blocks.py"),
    Mutation("blocks, iterations are counted on", "derivation/blocks.py", "count * LAYER + k if goes_on", "LAYER + k if goes_on", "derivation/test_blocks.py"),
    Mutation("blocks, iterations that start anew", "derivation/blocks.py", "else sp.Integer(k)}", "else sp.Integer(0)}", "derivation/test_blocks.py::test_a_block_that_starts_elsewhere_starts_anew"),
    Mutation("learning, what is larger comes first", "derivation/learning.py", "_size(w)), reverse=True", "_size(w)), reverse=False", "derivation/test_parametrise.py"),
    Mutation("Woodbury, its scale", "derivation/rewrites/exact.py", "scale(-c / (a + c), matmul(*factors))", "scale(-c / (1 + c), matmul(*factors))", "derivation/test_rewrites.py"),
    Mutation("push through, the sides that are left", "derivation/rewrites/exact.py", "(arg.rows - small.rows) * sp.log(a)", "(small.rows - arg.rows) * sp.log(a)", "derivation/test_rewrites.py"),
    Mutation("Neumann, what its rho is of", "derivation/rewrites/bounded.py", "spectral_norm(ratio)", "spectral_norm(m)", "derivation/test_rewrites.py"),
    Mutation("Neumann, the order of its bound", "derivation/rewrites/bounded.py", "rho ** (int(order) + 1)", "rho ** (int(order) + 2)", "derivation/test_rewrites.py"),
    Mutation("spectral bound, its constant", "derivation/rewrites/bounded.py", "constant(e.x.rows * sp.log(a))), gap)", "constant(q.cols * sp.log(a))), gap)", "derivation/test_rewrites.py"),
    Mutation("attention, the axis of its shares", "derivation/rewrites/causal.py", "coef=scale), 0, causal)", "coef=scale), 1, causal)", "derivation/test_rewrites.py"),
    Mutation("causal, the number of tokens so far", "derivation/rewrites/causal.py", "case Map(profile, args) if profile.has(n):", "case Map(profile, args) if False:", "derivation/test_rewrites.py laws/test_corners.py"),
    Mutation("frequencies, the transpose is conjugate", "derivation/rewrites/frequencies.py", "transpose(conjugated(b))", "transpose(b)", "lower/test_shifts.py"),
    Mutation("frequencies, the scale of the transform", "derivation/rewrites/frequencies.py", "scale(1 / sp.sqrt(sp.Mul(*sizes)), block)", "block", "lower/test_shifts.py"),
    # lower
    Mutation("divergence of an answer, its signs", "lower/operations.py", "found = slope(e, b.expand_as(e)) * b", "found = slope(e, b.expand_as(e))", "network/test_divergence_of_an_answer.py"),
    Mutation("probes, both ends", "calculus/divergence.py", "for side in (1, -1)]", "for side in (1, 0)]", "derivation/test_probes.py"),
    Mutation("divergence of singular values, the sides that are left", "lower/spectral.py", "abs(x.shape[-2] - x.shape[-1]) * to_zero.sum(-1)", "to_zero.sum(-1) * 0", "calculus/test_divergence.py"),
    Mutation("divergence of eigenvalues, each pair once", "lower/spectral.py", ".tril().sum((-2, -1))", ".sum((-2, -1))", "calculus/test_divergence.py"),
    Mutation("taken out of a sum, transposed", "lower/passes.py", "return b.flip(ref) if self.flip else ref", "return ref", "lower/test_graph.py"),
    Mutation("taken out of a sum, though read elsewhere", "lower/passes.py", "r.node in alone for r in", "True for r in", "lower/test_graph.py"),
    Mutation("a sign before a product, in its sum", "lower/passes.py", "tuple(-c for c in node.attrs[0])", "tuple(c for c in node.attrs[0])", "lower/test_graph.py"),
    Mutation("attention, fused along the other axis", "lower/passes.py", "shares.attrs[0] != (1 if weights.flip else 0)", "False", "lower/test_graph.py::test_attention_is_fused_where_the_weights_of_each_column_sum_to_one_and_nowhere_else"),
    Mutation("attention, scores of the others", "lower/passes.py", "factors == [b.flip(f) for f in reversed(factors)]", "len(factors) > 0", "lower/test_graph.py::test_attention_is_fused_where_the_weights_of_each_column_sum_to_one_and_nowhere_else laws/test_corners.py::test_scores_of_a_square_matrix_are_told_from_those_of_its_transpose"),
    Mutation("flattened sums, transposed", "lower/passes.py", "refs += [b.flip(r) for r in inner.inputs] if ref.flip else inner.inputs", "refs += inner.inputs", "lower/test_graph.py::test_a_sum_that_is_read_transposed_is_opened_transposed"),
    Mutation("distributed products, transposed", "lower/passes.py", "tuple(b.flip(r) for r in reversed(node.inputs[1:])) if term.flip else", "tuple(b.flip(r) for r in node.inputs[1:]) if term.flip else", "lower/test_graph.py::test_a_product_that_is_read_transposed_is_distributed_transposed"),
    Mutation("Parseval, weights of each place", "lower/passes.py", 'not (weights.node.op == "signal" or weights.shape[0] != 1)', 'not (weights.node.op == "signal")', "lower/test_shifts.py"),
    Mutation("roots, sums with a minus", "lower/passes.py", "all(c > 0 for c in node.attrs[0]) and all(", "all(", "lower/test_at_zero.py::test_a_root_of_a_difference_of_sizes_keeps_its_infinite_slope"),
    Mutation("sums over samples, of sums over samples", "lower/sums_over_samples.py", "if behind[i] or not _adds(node, views, samples):", "if not _adds(node, views, samples):", "network/test_networks.py::test_what_mixes_samples_is_constructed_at_once_or_as_if network/test_networks.py::test_sums_over_samples_are_taken_batch_by_batch"),
    Mutation("sums over samples, a projection of all", "lower/sums_over_samples.py", 'case "project" if node.attrs[0] not in COLUMNWISE:\n            return False', 'case "project":\n            return True', "network/test_networks.py::test_a_projection_of_all_samples_together_is_constructed_at_once"),
    Mutation("memberships that are no labels", "lower/operations.py", "x[i].mT @ (w[i, None] * y[i])", "x[i].mT @ y[i]", "network/test_networks.py::test_redunet_is_constructed_batch_by_batch network/test_losses.py"),
    Mutation("causal softmax, along rows", "lower/operations.py", "seen.tril() if dim == -1 else seen.triu()", "seen.triu()", "lower/test_graph.py::test_causal_shares_look_back_along_either_axis"),
    Mutation("drop path, its mean", "lower/operations.py", "return x * kept / (1 - rate)", "return x * kept", "network/test_networks.py::test_dropout_and_drop_path_act_on_the_update_while_training_only network/test_networks.py::test_drop_path_keeps_the_mean_of_an_update"),
    Mutation("frequencies that stand for two", "lower/operations.py", "x[..., 0] if n % 2 else", "x[..., 0] if True else", "lower/test_shifts.py::test_redunet_is_constructed_and_runs_as_the_spectral_layer"),
    Mutation("ball of the 1-norm, inside", "lower/operations.py", "shift.gather(-1, last).clamp_min(0)).clamp_min(0)", "shift.gather(-1, last)).clamp_min(0)", "lower/test_graph.py::test_projections_are_those_of_the_definition_and_lie_in_their_set"),
    Mutation("x log y, its slope in x", "lower/operations.py", "torch.where((x == 0) & (y == 0), 1, y)", "torch.where(x == 0, 1, y)", "calculus/test_stable.py::test_what_vanishes_times_a_log_has_the_log_for_its_slope"),
    Mutation("singular values, the opposite ones", "lower/spectral.py", "*a, -b[0], -b[1], b[2]", "*a, -b[0], b[1], b[2]", "lower/test_spectral.py"),
    Mutation("symmetric, of elementwise parts", "lower/graph.py", "(keeps and even)", "keeps", "lower/test_graph.py::test_emitted_text_has_the_value_that_the_mathematics_says"),
    # emit
    Mutation("a name that is still read", "emit/layer.py", "name in holds and holds[name] not in later", "name in holds", "derivation/test_algorithms.py::test_fista_is_the_algorithm_of_the_paper"),
    Mutation("uniform draws, their variance", "emit/initialise.py", "math.sqrt(3 / {rows.at(UNARY)})", "math.sqrt(1 / {rows.at(UNARY)})", "derivation/test_parametrise.py::test_draws_have_the_deviation_that_is_asked_for"),
    Mutation("symmetric parameters", "emit/layer.py", '.mT) / 2", PRODUCT)', '.mT)", PRODUCT)', "derivation/test_parametrise.py::test_constraints_hold_for_all_values_of_the_parameter derivation/test_parametrise.py::test_parameters_of_all_kinds_start_as_the_algorithm_and_count"),
    # solver
    Mutation("restart, its sign", "solver/iteration.py", "dot(moved, change) > 0", "dot(moved, change) < 0", "solver/test_solve.py"),
    Mutation("the least tolerance", "solver/solve.py", "return 50 * torch.finfo(dtype).eps", "return 5 * torch.finfo(dtype).eps", "solver/test_solve.py"),
    Mutation("momentum of every problem its own", "solver/iteration.py", "{n: s[going] for n, s in left.items()}", "{n: s[: int(going.sum())] for n, s in left.items()}", "solver/test_solve.py::test_every_problem_keeps_its_own_momentum_when_others_are_done"),
    Mutation("gap, its scale at 0", "solver/solve.py", "points = (torch.zeros_like(start), start)", "points = (start, start)", "solver/test_solve.py::test_the_error_of_a_lasso_is_its_gap_in_parts_of_half_the_squared_data"),
    Mutation("gap, the dual point is feasible", "solver/certificate.py", "sp.Max(2 * w, u * slot(2))", "(2 * w)", "solver/test_certificate.py"),
    Mutation("gap, of what is not convex", "solver/certificate.py", "any(p.smooth is None or not p.smooth.convex for p in smooth)", "any(p.smooth is None for p in smooth)", "solver/test_certificate.py::test_no_gap_where_the_smooth_part_is_not_convex"),
    Mutation("gap, of what is held", "solver/certificate.py", "if any(p.holds for p in parts):", "if False:", "derivation/test_held.py::test_what_holds_claims_neither_descent_nor_a_gap"),
    # network
    Mutation("trace, terms by the layer's own matrices", "network/trace.py", "known = k > 0 and not self.left and (not self.by_layer or self.labels[k - 1][0] == layer)", "known = k > 0 and not self.left", "model/test_whitebox.py"),
    Mutation("audit, what enters a step", "network/trace.py", "known = k > 0 and not self.left and", "known = k > 0 and", "model/test_audit.py"),
    Mutation("audit, what leaves a step", "network/trace.py", "if self.left else self._at(k + 1)", "if False else self._at(k + 1)", "model/test_audit.py"),
    Mutation("trace, what stands in on the way out", "network/trace.py", """ and p.where != "output":""", ":", "model/test_whitebox.py"),
    Mutation("orthonormal, columns", "network/values.py", "gram = m.mT @ m", "gram = m @ m.mT", "network/test_kinds.py::test_columns_are_what_orthonormal_is_about"),
    Mutation("saved, a value that was edited", "network/saved.py", "elif was[name] != now[name]:", "elif False:", "network/test_saved.py"),
    Mutation("loss, determinants in float64", "network/loss.py", """== "mps" else torch.float64\'""", """== "mps" else dtype\'""", "network/test_rates_float32.py network/test_losses.py"),
    Mutation("loss, what is maximised", "network/loss.py", 'minus = "" if self.problem.sign > 0 else "-"', 'minus = ""', "network/test_losses.py"),
    # model
    Mutation("moments, between batches", "model/whitebox.py", "off.square() * self.count * n / both", "off.square() * n / both", "model/test_whitebox.py::test_streamed_moments_are_those_of_all_samples_at_once"),
    Mutation("weights, positive ones", "model/weights.py", "state[name].copy_(_inside(self.net, name, value))", "state[name].copy_(value)", "model/test_weights.py"),
    Mutation("weights, two for one place", "model/weights.py", "if bool((filled[place] & (target[place] != value)).any()):", "if False:", "model/test_weights.py"),
    Mutation("weights, a part that nothing reads", "model/weights.py", "used[_place(slices(move.part), used)] = True", "used[...] = True", "model/test_weights.py"),
    # train
    Mutation("samples, another order in each epoch", "train/engine.py", "generator(self.seed + epoch)", "generator(self.seed)", "train/test_train_models.py::test_every_epoch_has_each_sample_once_in_an_order_of_its_own"),
    Mutation("augmentation, other draws in each step", "train/engine.py", "generator((self.seed + 1) * FOREVER + step)", "generator((self.seed + 1) * FOREVER)", "train/test_train_models.py::test_every_step_changes_images_anew"),
    Mutation("resume, random numbers", "train/engine.py", "torch.set_rng_state(state)", "pass", "train/test_train.py::test_an_interrupted_training_resumes_bit_for_bit"),
    Mutation("resume, patience", "train/engine.py", 'float(state_dict["best"]), int(state_dict["stale"])', 'float(state_dict["best"]), 0', "train/test_train.py::test_a_resumed_training_knows_the_best_so_far_and_since_when"),
    Mutation("resume, the best so far", "train/engine.py", 'float(state_dict["best"]), int(state_dict["stale"])', 'math.inf, int(state_dict["stale"])', "train/test_train.py::test_a_resumed_training_knows_the_best_so_far_and_since_when"),
    Mutation("resume, the clock", "train/engine.py", 'self.before = float(state_dict["seconds"])', "pass", "train/test_train.py::test_an_interrupted_training_resumes_bit_for_bit"),
    Mutation("resume, the loss since the last row", "train/engine.py", 'float(state_dict["sum"]), int(state_dict["count"])', "0.0, 0", "train/test_train.py::test_an_interrupted_training_resumes_bit_for_bit"),
    Mutation("averaged weights, the first steps", "train/engine.py", "(1 - self.decay) / (1 - self.decay**trainer.global_step)", "(1 - self.decay)", "train/test_train_models.py::test_the_average_is_the_closed_form_of_all_steps"),
    Mutation("warm-up, its first step", "train/engine.py", "(step + 1) / settings.warmup", "step / settings.warmup", "train/test_train.py::test_cosine_falls_from_one_to_nought_and_warm_up_rises"),
    Mutation("cosine, from the start of its stage", "train/engine.py", "(self.global_step - self.stage.start) / (self.stage.stop - self.stage.start)", "self.global_step / self.stage.stop", "train/test_train.py::test_the_learning_rate_of_each_step_is_that_of_its_stage"),
    Mutation("vectors do not decay", "train/groups.py", '"vector": (lr.matrices, 0.0)', '"vector": (lr.matrices, decay)', "train/test_train_models.py::test_matrices_alone_decay_and_run_json_says_which train/test_train_models.py::test_a_step_without_gradient_shrinks_matrices_and_nothing_else"),
    Mutation("held-out patches, beyond the cut", "train/data.py", "_choose(images[:, :, cut:], settings.validation", "_choose(images, settings.validation", "train/test_data.py"),
    Mutation("noise, in decibels of amplitude", "train/data.py", "10 ** (-settings.snr / 20)", "10 ** (-settings.snr / 10)", "train/test_data.py"),
    Mutation("hidden patches, the same at every look", "train/masked.py", "settings.seed + k):", "int(torch.initial_seed()) + k):", "train/test_train_models.py::test_masks_of_a_measurement_are_those_of_training_and_always_the_same"),
    # laws and specs
    Mutation("check, a module that is not the mathematics", "laws/laws.py", 'f"{EXACT:.0e}", _verdict(worst <= EXACT))\n\n\ndef by_hand(', 'f"{EXACT:.0e}", _verdict(True))\n\n\ndef by_hand(', "laws/test_laws.py::test_an_emitted_module_that_is_not_the_mathematics_is_found"),
    Mutation("check, a bound that does not hold", "laws/laws.py", "holds = math.isfinite(limit) and relative <= limit * (1 + 1e-9)", "holds = math.isfinite(limit)", "laws/test_laws.py::test_a_bound_that_does_not_hold_is_found"),
    Mutation("check, an objective that rises", "laws/laws.py", "_verdict(rise <= 1e-12)", "_verdict(True)", "laws/test_laws.py::test_another_iteration_than_the_one_that_is_claimed_is_found"),
    Mutation("sweep, the others as they were", "lower/operations.py", "fall = fall[..., 1:] - (swept[-1] - old) * q[..., i, i + 1 :]", "fall = fall[..., 1:]", "derivation/test_coordinate_descent.py"),
    Mutation("sweep, what nothing reads", "lower/operations.py", "t = 1 / torch.where(weight > 0, weight, least)", "t = 1 / torch.where(weight > 0, weight, 1)", "derivation/test_coordinate_descent.py"),
    Mutation("sweep, samples with operators of their own", "lower/operations.py", 'q = q.then("[..., None, :, :]")', "q = q", "derivation/test_coordinate_descent.py"),
    Mutation("sweep, what is not convex", "calculus/linear.py", "if (known := curvature.bounds(add(*smooth), z)) is None or not known.convex:", "if False:", "derivation/test_coordinate_descent.py"),
    Mutation("sweep, what clips an entry", "lower/operations.py", "if clip is not None:", "if False:", "derivation/test_coordinate_descent.py"),
    Mutation("auto, entry by entry", "derivation/algorithms.py", "return any(SWEEP in x.uses for x in letters(a.text))", "return False", "derivation/test_coordinate_descent.py"),
    Mutation("scaled states, in blocks", "derivation/blocks.py", "swap(s.scale, numbers)", "sp.S.One", "derivation/test_scaled_states.py"),
    Mutation("scaled states, between two steps", "derivation/blocks.py", "opens=k > 0, closes=k < count - 1", "opens=False, closes=False", "derivation/test_scaled_states.py"),
    Mutation("scaled states, a learned number", "derivation/learning.py", "scale=swap(s.scale)) if s.symbol in own else s", "scale=s.scale) if s.symbol in own else s", "derivation/test_scaled_states.py"),
    Mutation("adaptive ADMM, the gap as a gradient", "../specs/algorithms/adaptive_admm.yaml", "unit * norm(stack(K)) * sqrt(", "unit * sqrt(", "derivation/test_adaptive_admm.py"),
    Mutation("adaptive ADMM, when rho settles", "../specs/algorithms/adaptive_admm.yaml", "layer < settle", "layer <= settle", "derivation/test_adaptive_admm.py"),
    Mutation("adaptive ADMM, the bounds of rho", "../specs/algorithms/adaptive_admm.yaml", "minimum(maximum(moved, unit / most), unit * most)", "moved", "derivation/test_adaptive_admm.py"),
    Mutation("check, a prox that is beaten", "laws/laws.py", "_verdict(worst <= 1e-8)", "_verdict(True)", "laws/test_laws.py::test_a_prox_that_is_beaten_is_found"),
    Mutation("check, descent of what is maximised", "laws/laws.py", "cosine = value * d.problem.sign", "cosine = value", "laws/test_laws.py::test_a_direction_is_told_by_what_it_does_to_the_objective"),
    Mutation("specs, a positive default of 0", "spec/consistency.py", "if number.positive and default <= 0", "if number.positive and default < 0", "spec/test_spec.py::test_what_is_declared_positive_is_above_0_from_the_start"),
    Mutation("functions, a slope past its upper end", "lower/curves.py", "((x >= high) & (grad < 0))", "((x >= high) & (grad > 0))", "derivation/test_learned_functions.py::test_what_has_reached_its_end_comes_back"),
    Mutation("functions, the slope of a spline", "lower/curves.py", "k / width * c", "c / width", "derivation/test_learned_functions.py"),
    Mutation("tails, the first shared layer", "emit/layer.py", "own}[min(layer, {m.free})]", "own}[min(layer + 1, {m.free})]", "network/test_recurrent_tails.py"),
    Mutation("groups, across them", "lower/operations.py", ".unflatten(-1, (-1, {c.size(n)}))\")\n    return cut", ".unflatten(-1, ({c.size(n)}, -1)).mT\")\n    return cut", "calculus/test_groups.py"),
    Mutation("differences, their frequencies", "lower/operations.py", "4 * b * half", "2 * b * half", "lower/test_solving_differences.py"),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """said: the test that went red, or why there is none."""

    mutation: Mutation
    verdict: str
    said: str
    seconds: float


class Tree:
    """A copy of the checkout.  green: tests that are not red without a mutation."""

    def __init__(self, place: Path) -> None:
        self.place, self.green, self.written = place / "tree", set[str](), int(time.time())
        shutil.copytree(ROOT, self.place, ignore=APART)

    def write(self, file: Path, text: str) -> None:
        """At a second of its own: to Python two texts of one second and length are the same."""
        file.write_text(text, encoding="utf-8")
        self.written += 1
        os.utime(file, (self.written, self.written))

    def tried(self, m: Mutation) -> Result:
        """The mutation, made, tried and taken back. A test that is red without it too kills nothing."""
        file, begun, tests = self.place / "unroll" / m.file, time.monotonic(), [f"tests/{t}" for t in m.tests.split()]
        text = file.read_text(encoding="utf-8")
        if text.count(m.old) != 1:
            return Result(m, "text not found", f"{m.file} has it {text.count(m.old)} times", 0.0)
        self.write(file, text.replace(m.old, m.new))
        red = failed(self.place, tests)
        self.write(file, text)
        anyway = red not in {"", *self.green} and failed(self.place, ["--last-failed", *tests])
        self.green |= set() if anyway else {red}
        verdict = "red anyway" if anyway else "killed" if red else "survived"
        return Result(m, verdict, red.removeprefix("tests/"), time.monotonic() - begun)


def failed(tree: Path, words: list[str]) -> str:
    """The first test that fails in a tree, "" if none does; in a process that has loaded what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sympy", "networkx", "pydantic"])
    here, there = context.Pipe()
    process = context.Process(target=run, args=(tree, words, there))
    process.start()
    there.close()
    try:
        red = here.recv() if here.poll(SECONDS) else f"no end after {SECONDS} s"
    except EOFError:
        red = "the tests broke off"
    process.kill()
    process.join()
    return red


def run(tree: Path, words: list[str], told: Connection) -> None:
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = False  # of one file in a hundred the text is new
    seen = Seen()
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        code = pytest.main(["-x", "-q", "-n", "0", *words], plugins=[seen])
    assert (tree / "unroll" / "__init__.py").samefile(sys.modules["unroll"].__file__ or "")
    told.send(seen.red or (f"pytest ended with {int(code)}" if code else ""))


class Seen:
    """The first test, or file, that fails."""

    red = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.red = self.red or (report.nodeid if report.failed else "")

    pytest_collectreport = pytest_runtest_logreport


@click.command()
@click.option("--only", default="", help="those with this in their name, their file or their tests")
def main(only: str) -> None:
    """Try mutations against the tests that ought to see them. Ends with 1 if one survives."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as place:
        tree = Tree(Path(place))
        for m in (m for m in MUTATIONS if only in f"{m.name} {m.file} {m.tests}"):
            results.append(r := tree.tried(m))
            click.echo(f"{r.verdict:14} {m.file}: {m.name}  [{r.said}]  {r.seconds:.0f} s")
    counts = Counter(r.verdict for r in results)
    click.echo(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    raise SystemExit(any(r.verdict != "killed" for r in results))


if __name__ == "__main__":
    main()
