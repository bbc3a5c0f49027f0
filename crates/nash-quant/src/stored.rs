//! A solved tensor as one scratch entry: length of the record, record (JSON), stream, row scales, codebook.

use half::f16;
use nash_kernels::{PackedMatrix, PackedShape, Width};
use nash_models::LinearInfo;

use crate::QuantError;
use crate::session::{Solved, SolvedRecord};

/// Bytes of an entry.
pub(crate) fn encode(solved: &Solved) -> Result<Vec<u8>, QuantError> {
    let record = serde_json::to_vec(&solved.record).map_err(|source| QuantError::Json {
        what: "intermediate result".into(),
        source,
    })?;
    let packed = solved.packed();
    let mut out = Vec::with_capacity(packed.stream().len() + record.len() + 4096);
    out.extend_from_slice(&(record.len() as u64).to_le_bytes());
    out.extend_from_slice(&record);
    out.extend_from_slice(packed.stream());
    packed
        .row_scales()
        .iter()
        .for_each(|s| out.extend_from_slice(&s.to_le_bytes()));
    out.extend(packed.codebook().iter().map(|&v| v as u8));
    Ok(out)
}

/// The tensor of an entry; `None` if the entry does not fit its shape (then it is computed again).
pub(crate) fn decode(bytes: &[u8], info: &LinearInfo, width: Width) -> Option<Solved> {
    let shape = PackedShape {
        rows: info.rows,
        cols: info.cols,
        width,
    };
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (record, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let record: SolvedRecord = serde_json::from_slice(record).ok()?;
    let (stream, rest) = rest.split_at_checked(shape.stream_bytes()?)?;
    let (scales, codebook) = rest.split_at_checked(2 * info.rows)?;
    let row_scales = scales
        .chunks_exact(2)
        .map(|b| f16::from_le_bytes([b[0], b[1]]))
        .collect();
    let codebook = codebook.iter().map(|&v| v as i8).collect();
    let matrix = PackedMatrix::new(shape, stream.to_vec(), row_scales, codebook).ok()?;
    Some(Solved::new(matrix, record))
}
