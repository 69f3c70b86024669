"""Loops over the edges of atoms that know no tensor product. Loaded through ``cache.py``."""

import numpy as np

from mlip.ops.cpu.jit import compiled, piece


@compiled
def local_rows(rowptr, source, n0, n1, row_of, rows, targets):  # type: ignore[no-untyped-def]
    """Number the sources of atoms n0 … n1 − 1 in order of appearance.

    Args:
        rowptr, source: edges by target.
        n0, n1: atoms.
        row_of: [N] row of each atom; −1 if it is no source.
        rows: [E] row of the source of each edge, written for the edges of these atoms.
        targets: whether the atoms themselves have rows, too, where they have edges.

    Returns:
        Number of rows.
    """
    row_of[:] = -1
    count = 0
    for e in range(rowptr[n0], rowptr[n1]):
        atom = source[e]
        if row_of[atom] < 0:
            row_of[atom] = count
            count += 1
        rows[e] = row_of[atom]
    if targets:
        for atom in range(n0, n1):
            if row_of[atom] < 0 and rowptr[atom] < rowptr[atom + 1]:
                row_of[atom] = count
                count += 1
    return count


@compiled
def edges_exist(rowptr, source):  # type: ignore[no-untyped-def]
    """Whether pointers ascend from 0 to E and all sources are among the atoms."""
    n_atoms = len(rowptr) - 1
    if n_atoms < 0 or rowptr[0] != 0 or rowptr[-1] != len(source):
        return False
    wrong = 0
    for i in range(n_atoms):
        wrong += rowptr[i] > rowptr[i + 1]
    for atom in source:
        wrong += atom < 0 or atom >= n_atoms
    return wrong == 0


@compiled
def opposite_edges(rowptr, source, shift, first, edge, other):  # type: ignore[no-untyped-def]
    """Find the edges i ← j and j ← i, by the image of j and the opposite image of i.

    Those of two atoms follow one another in both rows, in opposite order of their images.

    Args:
        rowptr, source, shift: edges by target, then source, then image of the source.
        first: [N + 1] first pair of each target i, written.
        edge, other: [E] the edges of pairs, written from the front; i < j in the first.

    Returns:
        Number of pairs; −1 if an edge has no opposite, or edges are in another order.
    """
    n_atoms, count = len(rowptr) - 1, 0
    place = rowptr[:-1].copy()  # in each row, of the next edge from an atom before it
    for i in range(n_atoms):
        first[i] = count
        e, end = place[i], rowptr[i + 1]
        while e < end:
            j, n = source[e], 1
            while e + n < end and source[e + n] == j:
                n += 1
            at, chosen = place[j], n if j > i else n // 2
            if j < i or at + n > rowptr[j + 1]:
                return -1
            if j == i:
                at = e
            for k in range(chosen):
                a, b = e + n - chosen + k, at + chosen - 1 - k
                if source[b] != i:
                    return -1
                for axis in range(3):
                    if shift[a, axis] != -shift[b, axis]:
                        return -1
                edge[count], other[count] = a, b
                count += 1
            place[j] = at + n
            e += n
    first[n_atoms] = count
    return count if 2 * count == len(source) else -1


@compiled
def both_directions(half, sign, edge, other, out):  # type: ignore[no-untyped-def]
    """Write the rows of pairs to one edge of each, and times signs to the other."""
    width = half.shape[1]
    for p in range(len(edge)):
        a, b = edge[p], other[p]
        for column in range(width):
            out[a, column] = half[p, column]
            out[b, column] = half[p, column] * sign[column]


@compiled
def add_chunks(parts, first, row_of, width, out, start, n0, n1):  # type: ignore[no-untyped-def]
    """Add the rows that the chunks hold of atoms n0 … n1 − 1, in the order of the chunks.

    Args:
        parts: rows of all chunks.
        first: [chunks] where the rows of a chunk begin.
        row_of: [chunks, N] row of each atom, −1 if there is none.
        width: numbers in a row.
        out: what they are added to, from ``start`` on.
        start: where the row of atom 0 begins.
        n0, n1: atoms.
    """
    for atom in range(n0, n1):
        to = start + atom * width
        for chunk in range(row_of.shape[0]):
            row = row_of[chunk, atom]
            if row >= 0:
                of = first[chunk] + row * width
                for i in range(width):
                    out[to + i] += parts[of + i]


@compiled
def segment_sum(values, rowptr, out, n0, n1):  # type: ignore[no-untyped-def]
    """Sum consecutive rows: out[n] = Σ values[rowptr[n] … rowptr[n + 1] − 1]."""
    width = values.shape[1]
    for n in range(n0, n1):
        out[n, :] = 0
        for e in range(rowptr[n], rowptr[n + 1]):
            for i in range(width):
                out[n, i] += values[e, i]


@compiled
def segment_shares(logits, weights, rowptr, epsilon, out, n0, n1):  # type: ignore[no-untyped-def]
    """s = exp(z − max z) / (Σ w·exp(z − max z) + ε) over consecutive rows, column by column."""
    width = logits.shape[1]
    largest = np.empty(width, logits.dtype)
    total = np.empty(width, logits.dtype)
    for n in range(n0, n1):
        first, last = rowptr[n], rowptr[n + 1]
        largest[:] = -np.inf
        total[:] = 0
        for e in range(first, last):
            for i in range(width):
                largest[i] = max(largest[i], logits[e, i])
        for e in range(first, last):
            for i in range(width):
                out[e, i] = np.exp(logits[e, i] - largest[i])
                total[i] += weights[e] * out[e, i]
        for e in range(first, last):
            for i in range(width):
                out[e, i] /= total[i] + epsilon


@compiled
def table_values(table, rows, interval, t, out, e0, e1):  # type: ignore[no-untyped-def]
    """Evaluate cubic polynomials: out[e] = Σ_k table[rows[e], interval[e], k]·t[e]^k."""
    for e in range(e0, e1):
        a = table[rows[e], interval[e]]
        x = t[e]
        for c in range(out.shape[1]):
            out[e, c] = a[0, c] + x * (a[1, c] + x * (a[2, c] + x * a[3, c]))


@compiled
def table_slopes(table, rows, interval, t, gradient, out, e0, e1):  # type: ignore[no-untyped-def]
    """Sum the derivatives of ``table_values`` with respect to t, times gradients."""
    width = gradient.shape[1]
    sums = np.empty(16, gradient.dtype)
    for e in range(e0, e1):
        a = table[rows[e], interval[e]]
        x = t[e]
        x2, x3 = x + x, 3 * x * x
        sums[:] = 0
        for block in range(0, width - 15, 16):
            for i in range(16):
                c = block + i
                sums[i] += gradient[e, c] * (a[1, c] + x2 * a[2, c] + x3 * a[3, c])
        for c in range(width - width % 16, width):
            sums[0] += gradient[e, c] * (a[1, c] + x2 * a[2, c] + x3 * a[3, c])
        out[e] = sums.sum()


@piece
def edge_vector(positions, cell, s, t, x, y, z):  # type: ignore[no-untyped-def]
    """Components of r_s + (x, y, z) @ cell − r_t."""
    image = x * cell[0, 0] + y * cell[1, 0] + z * cell[2, 0]
    dx = image + (positions[s, 0] - positions[t, 0])
    image = x * cell[0, 1] + y * cell[1, 1] + z * cell[2, 1]
    dy = image + (positions[s, 1] - positions[t, 1])
    image = x * cell[0, 2] + y * cell[1, 2] + z * cell[2, 2]
    return dx, dy, image + (positions[s, 2] - positions[t, 2])


@compiled
def edge_vectors(positions, cell, edges, shifts, batch, out, e0, e1):  # type: ignore[no-untyped-def]
    """Write the vectors of edges e0 … e1 − 1; see ``edge_vectors.py``.

    Args:
        positions, cell: [N, 3] and [B, 3, 3], Å.
        edges, shifts: [2, E] and [E, 3] int64.
        batch: structures of atoms, not read if there is one.
        out: [E, 3], written.
        e0, e1: edges.

    Raises:
        IndexError: an atom or a structure does not exist.
    """
    n_atoms, n_cells, own = len(positions), len(cell), 0
    for e in range(e0, e1):
        s, t = edges[0, e], edges[1, e]
        if min(s, t) < 0 or max(s, t) >= n_atoms:
            raise IndexError
        if n_cells > 1:
            own = batch[t]
            if own < 0 or own >= n_cells:
                raise IndexError
        x, y, z = shifts[e, 0], shifts[e, 1], shifts[e, 2]
        out[e, 0], out[e, 1], out[e, 2] = edge_vector(positions, cell[own], s, t, x, y, z)


@compiled
def near_edges(  # type: ignore[no-untyped-def]
    positions, cell, origin, room, edges, shifts, cutoff, index, shift, vector
):
    """Copy the edges that are no longer than the cutoff, in order, with their vectors.

    Args:
        positions, cell: [N, 3] and [3, 3], Å.
        origin, room: [N, 3] and a distance, Å: no atom must be so far from its origin.
        edges, shifts: [2, E] and [E, 3] int64; atoms that exist.
        cutoff: Å.
        index, shift, vector: as these, and [E, 3] Å; written from the front.

    Returns:
        Number of edges written; −1 if an atom is too far from its origin.
    """
    for i in range(len(positions)):
        square = 0.0
        for k in range(3):
            length = positions[i, k] - origin[i, k]
            square += length * length
        if not (room > 0 and square < room * room):
            return -1
    count = 0
    for e in range(edges.shape[1]):
        s, t = edges[0, e], edges[1, e]
        x, y, z = shifts[e, 0], shifts[e, 1], shifts[e, 2]
        dx, dy, dz = edge_vector(positions, cell, s, t, x, y, z)
        if dx * dx + dy * dy + dz * dz <= cutoff * cutoff:
            index[0, count], index[1, count] = s, t
            shift[count, 0], shift[count, 1], shift[count, 2] = x, y, z
            vector[count, 0], vector[count, 1], vector[count, 2] = dx, dy, dz
            count += 1
    return count


@compiled
def edge_sums(gradient, vector, edges, batch, forces, virial, e0, e1):  # type: ignore[no-untyped-def]
    """Add the forces and the symmetric virial of edges e0 … e1 − 1; see ``edge_gradient.py``.

    Sums of an atom are made first and then added: long sums of short ones lose fewer digits.

    Args:
        gradient, vector: [E, 3].
        edges, batch: sources and targets [2, E], structures of atoms.
        forces: [N, 3] float64, added to.
        virial: [B, 3, 3] float64, added to.
        e0, e1: edges.

    Raises:
        IndexError: an atom or a structure does not exist.
    """
    n_atoms = len(forces)
    source, target = edges[0], edges[1]
    e = e0
    while e < e1:
        t = target[e]
        if t < 0 or t >= n_atoms or batch[t] < 0 or batch[t] >= len(virial):
            raise IndexError
        fx = fy = fz = xx = yy = zz = xy = xz = yz = 0.0
        while e < e1 and target[e] == t:
            s = source[e]
            if s < 0 or s >= n_atoms:
                raise IndexError
            gx, gy, gz = (
                np.float64(gradient[e, 0]),
                np.float64(gradient[e, 1]),
                np.float64(gradient[e, 2]),
            )
            dx, dy, dz = vector[e, 0], vector[e, 1], vector[e, 2]
            fx, fy, fz = fx + gx, fy + gy, fz + gz
            forces[s, 0] -= gx
            forces[s, 1] -= gy
            forces[s, 2] -= gz
            xx, yy, zz = xx + gx * dx, yy + gy * dy, zz + gz * dz
            xy += 0.5 * (gx * dy + gy * dx)
            xz += 0.5 * (gx * dz + gz * dx)
            yz += 0.5 * (gy * dz + gz * dy)
            e += 1
        forces[t, 0] += fx
        forces[t, 1] += fy
        forces[t, 2] += fz
        own = virial[batch[t]]
        own[0, 0] += xx
        own[1, 1] += yy
        own[2, 2] += zz
        for i, j, value in ((0, 1, xy), (0, 2, xz), (1, 2, yz)):
            own[i, j] += value
            own[j, i] += value


@compiled
def edge_slopes(  # type: ignore[no-untyped-def]
    force, strain, gradient, vector, edges, batch, of_gradient, of_vector, e0, e1
):
    """Write the derivatives of Σ force·forces + Σ strain·virial by the rows of ``edge_sums``.

    Args:
        force: [N, 3].
        strain: [B, 3, 3].
        gradient, vector, edges, batch: as there.
        of_gradient, of_vector: [E, 3], written.
        e0, e1: edges.

    Raises:
        IndexError: an atom or a structure does not exist.
    """
    n_atoms = len(force)
    for e in range(e0, e1):
        s, t = edges[0, e], edges[1, e]
        if min(s, t) < 0 or max(s, t) >= n_atoms or batch[t] < 0 or batch[t] >= len(strain):
            raise IndexError
        own = strain[batch[t]]
        for i in range(3):
            by_gradient, by_vector = force[t, i] - force[s, i], 0 * force[t, i]
            for j in range(3):
                factor = (own[i, j] + own[j, i]) / 2
                by_gradient += factor * vector[e, j]
                by_vector += factor * gradient[e, j]
            of_gradient[e, i] = by_gradient
            of_vector[e, i] = by_vector


@compiled
def screened_pairs(vector, edges, numbers, law, energy, slope, e0, e1):  # type: ignore[no-untyped-def]
    """Write the energy of edges e0 … e1 − 1 and E'(r)/r; see ``mlip.ops.cpu.screened_pairs``.

    Raises:
        IndexError: an atom or an element does not exist.
    """
    atoms, screening, cutoff, p = law
    a, b, c = -(p + 1) * (p + 2) / 2, p * (p + 2), -p * (p + 1) / 2
    for e in range(e0, e1):
        i, j = edges[0, e], edges[1, e]
        if min(i, j) < 0 or max(i, j) >= len(numbers):
            raise IndexError
        i, j = numbers[i], numbers[j]
        if min(i, j) < 0 or max(i, j) >= len(atoms):
            raise IndexError
        energy[e] = slope[e] = 0
        x, y, z = np.float64(vector[e, 0]), np.float64(vector[e, 1]), np.float64(vector[e, 2])
        square, reach = x * x + y * y + z * z, min(atoms[i, 2] + atoms[j, 2], cutoff)
        if square < reach * reach:
            r, per_length = np.sqrt(square), atoms[i, 1] + atoms[j, 1]
            total = by_r = 0.0
            for k in range(len(screening)):
                rate = screening[k, 1] * per_length
                term = screening[k, 0] * np.exp(-rate * r)
                total, by_r = total + term, by_r - rate * term
            s = r / reach
            power = s ** (p - 1)
            u = 1 + power * s * (a + s * (b + s * c))
            du = power * (p * a + s * ((p + 1) * b + s * ((p + 2) * c))) / reach
            coulomb = atoms[i, 0] * atoms[j, 0] / r
            energy[e] = coulomb * total * u
            slope[e] = coulomb * (by_r * u + total * du - total * u / r) / r


@compiled
def along_vectors(vector, edges, gradient, slope, out, e0, e1):  # type: ignore[no-untyped-def]
    """Write gradient[target]·slope·vector of edges e0 … e1 − 1."""
    for e in range(e0, e1):
        factor = gradient[edges[1, e]] * slope[e]
        for i in range(3):
            out[e, i] = factor * vector[e, i]
