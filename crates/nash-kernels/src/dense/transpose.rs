//! Transposition of f32 matrices into a buffer, 8 × 8 in registers where AVX is there.

#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "a kernel of an instruction set")
)]

/// Side of the squares.
const SIDE: usize = 8;

/// Fills `out` with the transpose `[cols, rows]` of the matrix `[rows, cols]` whose row `r` begins at
/// `data[r · stride]`.
///
/// # Panics
/// If a row is not inside `data`, or `out` has another length.
pub(super) fn transpose(data: &[f32], stride: usize, (rows, cols): (usize, usize), out: &mut [f32]) {
    assert_eq!(out.len(), rows * cols, "elements of a transpose [{cols}, {rows}]");
    let square = square_for_cpu();
    let (whole_rows, whole_cols) = (rows - rows % SIDE, cols - cols % SIDE);
    for col in (0..whole_cols).step_by(SIDE) {
        for row in (0..whole_rows).step_by(SIDE) {
            square(
                &data[row * stride + col..],
                stride,
                &mut out[col * rows + row..],
                rows,
            );
        }
    }
    for row in 0..rows {
        let done = if row < whole_rows { whole_cols } else { 0 };
        let values = &data[row * stride..][..cols];
        for (col, value) in values.iter().enumerate().skip(done) {
            out[col * rows + row] = *value;
        }
    }
}

type Square = fn(&[f32], usize, &mut [f32], usize);

fn square_for_cpu() -> Square {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") {
        return |data, stride, out, out_stride| {
            // SAFETY: this CPU has AVX.
            unsafe { square_avx(data, stride, out, out_stride) }
        };
    }
    square
}

fn square(data: &[f32], stride: usize, out: &mut [f32], out_stride: usize) {
    for row in 0..SIDE {
        for (col, value) in data[row * stride..][..SIDE].iter().enumerate() {
            out[col * out_stride + row] = *value;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
fn square_avx(data: &[f32], stride: usize, out: &mut [f32], out_stride: usize) {
    use std::arch::x86_64::*;
    use std::array::from_fn;

    let rows: [__m256; SIDE] = from_fn(|row| {
        let row = &data[row * stride..][..SIDE];
        // SAFETY: eight floats of a slice of eight are read.
        unsafe { _mm256_loadu_ps(row.as_ptr()) }
    });
    // In each half: element i of rows 2p and 2p + 1 side by side, then of rows 4p to 4p + 3.
    let twos: [__m256; SIDE] = from_fn(|i| {
        let (a, b) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
        if i % 2 == 0 {
            _mm256_unpacklo_ps(a, b)
        } else {
            _mm256_unpackhi_ps(a, b)
        }
    });
    let fours: [__m256; SIDE] = from_fn(|i| {
        let (a, b) = (twos[i / 4 * 4 + i % 4 / 2], twos[i / 4 * 4 + i % 4 / 2 + 2]);
        if i % 2 == 0 {
            _mm256_shuffle_ps::<0b01_00_01_00>(a, b)
        } else {
            _mm256_shuffle_ps::<0b11_10_11_10>(a, b)
        }
    });
    for col in 0..SIDE {
        let (a, b) = (fours[col % 4], fours[col % 4 + 4]);
        let whole = match col / 4 {
            0 => _mm256_permute2f128_ps::<0x20>(a, b),
            _ => _mm256_permute2f128_ps::<0x31>(a, b),
        };
        let out = &mut out[col * out_stride..][..SIDE];
        // SAFETY: eight floats are written to a slice of eight.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), whole) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_lands_where_it_should() {
        for (rows, cols) in [(0, 5), (5, 0), (1, 1), (8, 8), (7, 9), (16, 24), (19, 33)] {
            for padding in [0, 3] {
                let stride = cols + padding;
                let data: Vec<f32> = (0..rows * stride).map(|i| i as f32).collect();
                let mut out = vec![f32::NAN; rows * cols];
                transpose(&data, stride, (rows, cols), &mut out);
                let expected = (0..cols * rows).map(|i| (i % rows * stride + i / rows) as f32);
                assert!(out.iter().copied().eq(expected), "{rows} x {cols}");
            }
        }
    }

    #[test]
    fn all_squares_agree() {
        let data: Vec<f32> = (0..SIDE * 11).map(|i| i as f32).collect();
        let mut expected = vec![0.0; SIDE * 9];
        square(&data, 11, &mut expected, 9);
        let mut out = vec![0.0; SIDE * 9];
        square_for_cpu()(&data, 11, &mut out, 9);
        assert_eq!(out, expected);
    }
}
