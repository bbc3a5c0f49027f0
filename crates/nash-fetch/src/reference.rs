//! What a user types to name a model: a catalogue name or a hub id.

use std::fmt;
use std::str::FromStr;

use crate::{CATALOG, CatalogModel, FetchError};

/// A model that can be fetched. Parsed from `smollm2` (the catalogue), or `owner/name`, `owner/name@revision`,
/// `owner/name:FILE.gguf` (the hub; a leading `hf:` or `hf://` is allowed).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// A model of the catalogue.
    Catalog(&'static CatalogModel),
    /// A repository of the hub.
    Hub(HubRef),
}

/// A repository of the hub, a revision of it, perhaps one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubRef {
    /// `owner/name`.
    pub repo: String,
    /// Branch, tag or commit; `None` is `main`.
    pub revision: Option<String>,
    /// A GGUF file of the repository, with its folder; `None` for the whole model.
    pub file: Option<String>,
}

impl FromStr for ModelRef {
    type Err = FetchError;

    fn from_str(text: &str) -> Result<Self, FetchError> {
        if let Some(model) = CatalogModel::find(text) {
            return Ok(Self::Catalog(model));
        }
        HubRef::parse(text)
            .map(Self::Hub)
            .ok_or_else(|| FetchError::BadReference {
                text: text.to_owned(),
                known: CATALOG
                    .iter()
                    .map(|model| model.name)
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }
}

impl HubRef {
    fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix("hf:").unwrap_or(text).trim_start_matches("//");
        let (text, file) = match text.split_once(':') {
            Some((text, file)) => (text, Some(file)),
            None => (text, None),
        };
        let (repo, revision) = match text.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = repo.split_once('/')?;
        let valid = is_segment(owner)
            && is_segment(name)
            && revision.is_none_or(is_safe_path)
            && file.is_none_or(|file| is_safe_path(file) && file.ends_with(".gguf"));
        valid.then(|| Self {
            repo: repo.to_owned(),
            revision: revision.map(str::to_owned),
            file: file.map(str::to_owned),
        })
    }
}

/// A name that stays where it is put when joined to a folder: no separator, not `.` or `..`.
fn is_segment(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('.')
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Segments joined by `/`: a relative path that cannot leave its folder.
pub(crate) fn is_safe_path(text: &str) -> bool {
    text.split('/').all(is_segment)
}

impl fmt::Display for HubRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        self.revision
            .iter()
            .try_for_each(|revision| write!(f, "@{revision}"))?;
        self.file.iter().try_for_each(|file| write!(f, ":{file}"))
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Catalog(model) => f.write_str(model.name),
            Self::Hub(model) => model.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_ids() {
        assert!(matches!("smollm2".parse().unwrap(), ModelRef::Catalog(m) if m.name == "smollm2"));
        let hub = |repo: &str, revision: Option<&str>, file: Option<&str>| {
            ModelRef::Hub(HubRef {
                repo: repo.into(),
                revision: revision.map(Into::into),
                file: file.map(Into::into),
            })
        };
        assert_eq!("a/b-1.5".parse::<ModelRef>().unwrap(), hub("a/b-1.5", None, None));
        assert_eq!(
            "hf://a/b@v1".parse::<ModelRef>().unwrap(),
            hub("a/b", Some("v1"), None)
        );
        assert_eq!(
            "hf:a/b@refs/pr/1:x/y.gguf".parse::<ModelRef>().unwrap(),
            hub("a/b", Some("refs/pr/1"), Some("x/y.gguf"))
        );
        for bad in [
            "",
            "smollm",
            "a/b/c",
            "/a",
            "a/",
            "../b",
            "a/..",
            "a/b:../c.gguf",
            "a/b:/c.gguf",
            "a/b:c.bin",
            "a/b@../x",
            "a/b c",
        ] {
            assert!(bad.parse::<ModelRef>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn display_parses_back(text in "(hf:)?[a-z.]{1,4}/[a-z.]{1,4}(@[a-z/.]{1,4})?(:[a-z/.]{1,4}\\.gguf)?") {
            if let Ok(model) = text.parse::<ModelRef>() {
                prop_assert_eq!(model.to_string().parse::<ModelRef>().unwrap(), model);
            }
        }
    }
}
