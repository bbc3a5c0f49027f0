//! Assembling the packed folder.

use std::path::Path;

use nash_core::atomic;
use nash_core::packed_write::{PackedLayout, PackedWriter, TensorSpec};
use nash_core::{DType, PackedFolder};
use nash_models::Site;
use serde_json::{Map, json};

use crate::QuantError;
use crate::report::Report;
use crate::session::{Session, Solved};

/// Tokens of the calibration windows, an array of arrays: what `verify` needs to rebuild the Hessians.
pub(crate) const CALIBRATION_FILE: &str = "calibration.json";

/// Writes the tokenizer's text files into a folder.
pub type SaveTokenizer<'a> = dyn Fn(&Path) -> Result<(), Box<dyn std::error::Error + Send + Sync>> + 'a;

/// Writes everything and returns the report with the sizes that were measured on disk.
pub(crate) fn write(
    session: &Session<'_>,
    content: &Content,
    report: Report,
    save_tokenizer: &SaveTokenizer<'_>,
    out: &Path,
) -> Result<Report, QuantError> {
    let Content { solved, floats } = content;
    let float_spec = |(name, shape, _): &FloatTensor| TensorSpec::Float {
        name: name.clone(),
        dtype: DType::F16,
        shape: shape.clone(),
    };
    let packed = session.linears.iter().zip(solved);
    let specs = packed.clone().map(|(info, s)| TensorSpec::Packed {
        name: info.name.clone(),
        shape: s.packed().shape(),
    });
    let layout = PackedLayout::new(specs.chain(floats.iter().map(float_spec)))?;
    session.progress.stage("write", solved.len() as u64);
    let mut writer = PackedWriter::create(out, layout)?;
    for (info, s) in packed {
        writer.packed(&info.name, s.packed())?;
        session.progress.advance(1);
    }
    for (name, _, values) in floats {
        writer.float(name, values)?;
    }
    save_tokenizer(out).map_err(|source| QuantError::Io {
        path: out.into(),
        source: std::io::Error::other(source),
    })?;
    let tokens =
        serde_json::to_vec(&session.options.calibration.windows).map_err(|source| QuantError::Json {
            what: CALIBRATION_FILE.into(),
            source,
        })?;
    atomic::write(out.join(CALIBRATION_FILE), tokens)?;
    let config = session.model.config();
    let mut map = Map::new();
    map.insert("model_type".into(), json!(config.architecture));
    map.insert("nashswarm_model".into(), json!(config));
    let folder: PackedFolder = writer.finish(map, report.to_map()?)?;
    Report::read(&folder)
}

/// Name, shape and values of a tensor that stays in float.
pub(crate) type FloatTensor = (String, Vec<usize>, Vec<f32>);

/// The tensors of a folder.
pub(crate) struct Content {
    /// In the order of [`Session::linears`].
    pub(crate) solved: Vec<Solved>,
    pub(crate) floats: Vec<FloatTensor>,
}

/// The source's norms, biases, positions and routers.
pub(crate) fn floats(session: &Session<'_>) -> Result<Vec<FloatTensor>, QuantError> {
    let mut floats = session.model.float_tensors();
    for info in session
        .model
        .linears()
        .into_iter()
        .filter(|l| l.site == Site::Router)
    {
        let values = session.weights(&info)?;
        floats.push((
            format!("{}.weight", info.name),
            vec![info.rows, info.cols],
            values,
        ));
    }
    Ok(floats)
}
