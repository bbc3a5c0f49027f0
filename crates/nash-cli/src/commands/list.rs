//! `list`: the models that are here, and those that can be fetched by name.

use clap::Args;
use nash_fetch::CATALOG;

use crate::args::Json;
use crate::format;
use crate::out::say;
use crate::store::Store;
use crate::table::table;

/// List fetched models and models that can be fetched by name
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    json: Json,
}

#[derive(serde::Serialize)]
struct Row {
    name: String,
    model: Option<&'static str>,
    bytes: Option<u64>,
    license: Option<&'static str>,
    path: Option<std::path::PathBuf>,
}

impl List {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let mut here = Store::open()?.models();
        let mut rows: Vec<Row> = CATALOG
            .iter()
            .map(|model| Row {
                name: model.name.to_owned(),
                model: Some(model.title),
                bytes: Some(model.bytes),
                license: Some(model.license),
                path: here.remove(model.name),
            })
            .collect();
        rows.extend(here.into_iter().map(|(name, path)| {
            Row {
                name,
                model: None,
                bytes: std::fs::metadata(&path)
                    .ok()
                    .filter(std::fs::Metadata::is_file)
                    .map(|data| data.len()),
                license: None,
                path: Some(path),
            }
        }));
        self.json.write(&rows)?;
        if self.json.replaces_table() {
            return Ok(());
        }
        let mut table = table(&["name", "size", "licence", "model", "where"]);
        for row in &rows {
            table.add_row([
                row.name.clone(),
                row.bytes.map(format::bytes).unwrap_or_default(),
                row.license.unwrap_or_default().to_owned(),
                row.model.unwrap_or_default().to_owned(),
                row.path
                    .as_ref()
                    .map_or("not fetched".into(), |path| path.display().to_string()),
            ]);
        }
        say!("{table}");
        Ok(())
    }
}
