//! Where questions come from: a folder, or the Hugging Face hub.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nash_eval::glue::{self, HubFile, Split, Task};
use nash_fetch::HubRef;

use crate::commands::pull;
use crate::failure::Hint as _;
use crate::interrupt;
use crate::ui::Ui;

/// What stands for the hub in place of a folder.
pub(crate) const HUB: &str = "hub";

/// Files with questions and examples.
pub(crate) enum Source {
    /// A folder of the user.
    Folder(PathBuf),
    /// Folders in the hub's cache, by data set.
    Hub(BTreeMap<&'static str, PathBuf>),
}

impl Source {
    /// The folder, or from the hub the files of these parts of the tasks, which are fetched unless they are here.
    pub(crate) fn open(data: &Path, parts: &[(Task, Split)], ui: &Ui) -> anyhow::Result<Self> {
        if data.as_os_str() != HUB {
            return Ok(Self::Folder(data.to_owned()));
        }
        let mut wanted = BTreeMap::<&'static str, Vec<String>>::new();
        for &(task, split) in parts {
            let HubFile { repo, path } = glue::hub_file(task, split);
            wanted.entry(repo).or_default().push(path);
        }
        let folders = wanted.into_iter().map(|(repo, files)| {
            let dataset = HubRef {
                repo: repo.to_owned(),
                revision: None,
                file: None,
            };
            let files: Vec<&str> = files.iter().map(String::as_str).collect();
            let folder = nash_fetch::fetch_dataset(&dataset, &files, &mut pull::progress(ui)).hint(format!(
                "give --data DIR, a folder with {} of https://huggingface.co/datasets/{repo}, or with the files that \
                 `nashswarm help glue` names",
                files.join(" and "),
            ))?;
            ui.finish();
            interrupt::check()?;
            Ok((repo, folder))
        });
        Ok(Self::Hub(folders.collect::<anyhow::Result<_>>()?))
    }

    /// The file of a part of a task.
    pub(crate) fn file(&self, task: Task, split: Split) -> anyhow::Result<PathBuf> {
        let folder = match self {
            Self::Folder(folder) => folder,
            Self::Hub(folders) => {
                let HubFile { repo, .. } = glue::hub_file(task, split);
                // Every part that is asked for was named before.
                folders.get(repo).map_or(Path::new(HUB), PathBuf::as_path)
            }
        };
        glue::find(folder, task, split)
            .hint("`nashswarm help glue` says which files are looked for; `--data hub` fetches them")
    }

    /// Where the questions of a task are from, for reports: the folder, or data set and commit.
    pub(crate) fn name(&self, task: Task) -> String {
        match self {
            Self::Folder(folder) => folder.display().to_string(),
            Self::Hub(folders) => {
                let HubFile { repo, .. } = glue::hub_file(task, Split::Dev);
                let commit = folders.get(repo).and_then(|folder| folder.file_name());
                let commit = commit.unwrap_or_default().to_string_lossy();
                format!("{repo}@{commit} on the Hugging Face hub")
            }
        }
    }
}
