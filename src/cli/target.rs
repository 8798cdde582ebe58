//! Reads what a command names: resources by id or name, sizes with units, `key=value` labels, files.
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use model::page::Page;
use model::server::Rate;
use model::{Labels, Name};
use serde::Deserialize;

use crate::client::Client;
use crate::error::Error;
use crate::limits::FILE_BYTES_MAX;

/// What of a resource is needed to address it.
#[derive(Debug, Deserialize)]
struct Named {
    id: uuid::Uuid,
}

/// The id of the `kind` (plural, as in the path) that is called `name_or_id`.
pub(crate) async fn resolve(client: &Client, kind: &'static str, name_or_id: &str) -> Result<String, Error> {
    if let Ok(id) = uuid::Uuid::parse_str(name_or_id) {
        return Ok(id.to_string());
    }
    let missing = || Error::NoSuchName { kind: kind.trim_end_matches('s'), name: name_or_id.to_owned() };
    // What cannot be a name is not sent: it could not be found.
    let name: Name = name_or_id.parse().map_err(|_| missing())?;
    let page: Page<Named> = client.get(&format!("/v1/{kind}?name={name}&limit=1")).await?;
    page.items.first().map(|named| named.id.to_string()).ok_or_else(missing)
}

/// A size: bytes, or a number with K, M, G or T (binary), such as `2G` or `512MiB`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(format!("{unit:?} is not a unit; use K, M, G or T, which are powers of 1024")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size, such as 512M or 2G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

/// A rate of bytes, such as 100M, or with a burst, 100M:500M.
pub(crate) fn byte_rate(text: &str) -> Result<Rate, String> {
    rate(text, size)
}

/// A new limit of bytes: a rate, or none at all.
pub(crate) fn byte_limit(text: &str) -> Result<Limit, String> {
    if text == NONE { Ok(Limit(None)) } else { byte_rate(text).map(|rate| Limit(Some(rate))) }
}

/// A new limit of requests or packets: a rate, or none at all.
pub(crate) fn count_limit(text: &str) -> Result<Limit, String> {
    if text == NONE { Ok(Limit(None)) } else { count_rate(text).map(|rate| Limit(Some(rate))) }
}

/// A limit to set, or to lift.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit(pub(crate) Option<Rate>);

/// How a limit is lifted on the command line.
const NONE: &str = "none";

/// A rate of requests or packets, such as 5000, or with a burst, 5000:20000.
pub(crate) fn count_rate(text: &str) -> Result<Rate, String> {
    rate(text, |text| text.parse().map_err(|_| format!("{text:?} is not a number, such as 5000")))
}

fn rate(text: &str, number: impl Fn(&str) -> Result<u64, String>) -> Result<Rate, String> {
    let (per_second, burst) = match text.split_once(':') {
        Some((per_second, burst)) => (number(per_second)?, Some(number(burst)?)),
        None => (number(text)?, None),
    };
    match per_second == 0 || burst == Some(0) {
        true => Err("a rate is at least 1; leave the option out for no limit".to_owned()),
        false => Ok(Rate { per_second, burst }),
    }
}

/// One `key=value`.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Labels from a repeated `--label`.
pub(crate) fn labels(pairs: &[(String, String)]) -> Result<Labels, Error> {
    let map: BTreeMap<String, String> = pairs.iter().cloned().collect();
    Labels::try_from(map).map_err(|error| Error::Usage(error.to_string()))
}

/// One `key=value` to set or `key-` to remove.
pub(crate) fn label_change(text: &str) -> Result<(String, Option<String>), String> {
    match (text.split_once('='), text.strip_suffix('-')) {
        (Some((key, value)), _) => Ok((key.to_owned(), Some(value.to_owned()))),
        (None, Some(key)) => Ok((key.to_owned(), None)),
        _ => Err(format!("{text:?} is neither KEY=VALUE nor KEY- (which removes)")),
    }
}

/// A text file, bounded.
pub(crate) fn read_text(path: &Path) -> Result<String, Error> {
    let read = || {
        let mut text = String::new();
        std::fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(std::io::Error::other(format!("longer than {FILE_BYTES_MAX} bytes")));
        }
        Ok(text)
    };
    read().map_err(|cause| Error::Read { path: path.to_owned(), cause })
}

/// A file to be sent, with its length where that is known before its end.
pub(crate) fn open(path: &Path) -> Result<(std::fs::File, Option<u64>), Error> {
    let open = || {
        let file = std::fs::File::open(path)?;
        let about = file.metadata()?;
        match about.is_dir() {
            true => Err(std::io::ErrorKind::IsADirectory.into()),
            false => Ok((file, about.is_file().then_some(about.len()))),
        }
    };
    open().map_err(|cause| Error::Read { path: path.to_owned(), cause })
}

/// A value for a query string.
pub(crate) fn percent_encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte as char),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// How to narrow, order and page a list.
#[derive(Debug, clap::Args)]
pub(crate) struct ListOptions {
    /// Only what has these labels: key=value, key!=value, key, !key; comma-separated terms must all hold.
    #[arg(short = 'l', long)]
    label_selector: Option<String>,
    /// Order: created_at, -created_at, name or -name.
    #[arg(long, allow_hyphen_values = true)]
    sort: Option<String>,
    /// At most this many; all when absent.
    #[arg(long)]
    limit: Option<usize>,
}

/// Every item of a list, page by page.
pub(crate) async fn list<T: serde::de::DeserializeOwned>(
    client: &Client,
    kind: &str,
    options: &ListOptions,
) -> Result<Vec<T>, Error> {
    list_with(client, kind, options, &[]).await
}

/// As [`list`], with parameters that only this list has.
pub(crate) async fn list_with<T: serde::de::DeserializeOwned>(
    client: &Client,
    kind: &str,
    options: &ListOptions,
    more: &[(&str, Option<&str>)],
) -> Result<Vec<T>, Error> {
    let mut parameters =
        vec![("label_selector", options.label_selector.as_deref()), ("sort", options.sort.as_deref())];
    parameters.extend(more);
    pages(client, kind, &parameters, options.limit).await
}

/// At most `most` items of a list with these parameters, page by page; all without.
pub(crate) async fn pages<T: serde::de::DeserializeOwned>(
    client: &Client,
    kind: &str,
    parameters: &[(&str, Option<&str>)],
    most: Option<usize>,
) -> Result<Vec<T>, Error> {
    let mut items = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let rest = most.map_or(usize::MAX, |most| most.saturating_sub(items.len()));
        if rest == 0 {
            return Ok(items);
        }
        let page_limit = rest.min(model::limits::PAGE_ITEMS_MAX as usize);
        let mut path = format!("/v1/{kind}?limit={page_limit}");
        for (name, value) in parameters.iter().copied().chain([("cursor", cursor.as_deref())]) {
            if let Some(value) = value {
                path.push_str(&format!("&{name}={}", percent_encode(value)));
            }
        }
        let page: Page<T> = client.get(&path).await?;
        items.extend(page.items);
        match page.next_cursor {
            Some(next) => cursor = Some(next),
            None => return Ok(items),
        }
    }
}
