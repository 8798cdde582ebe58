//! How answers are printed: a table for people, JSON for programs, names for shell loops.
use std::io::Write;

use clap::ValueEnum;
use model::Time;
use serde::Serialize;

use crate::error::Error;

/// The form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    Table,
    /// The API's own documents.
    Json,
    /// One name, or id where there is no name, a line.
    Name,
}

/// Something that can be a line of a table.
pub(crate) trait Row: Serialize {
    /// The head of the table.
    const COLUMNS: &'static [&'static str];
    /// One cell a column.
    fn cells(&self) -> Vec<String>;
    /// What to call it on a command line.
    fn name(&self) -> String;
}

/// Prints one thing.
pub(crate) fn one<T: Row>(format: Format, item: &T) -> Result<(), Error> {
    match format {
        Format::Table => {
            // One thing is easier to read downwards.
            let cells = item.cells();
            let width = T::COLUMNS.iter().map(|column| column.len()).max().unwrap_or(0);
            let lines = T::COLUMNS.iter().zip(cells).filter(|(_, cell)| !cell.is_empty());
            print_text(&lines.map(|(column, cell)| format!("{column:width$}  {cell}\n")).collect::<String>())
        }
        Format::Json => json(item),
        Format::Name => print_text(&format!("{}\n", item.name())),
    }
}

/// Prints a plan of which `item` is what would be made.
pub(crate) fn plan<T: Row>(
    format: Format,
    plan: &impl Serialize,
    item: &T,
    steps: &[String],
) -> Result<(), Error> {
    match format {
        Format::Json => json(plan),
        Format::Name => print_text(&format!("{}\n", item.name())),
        Format::Table => {
            one(format, item)?;
            let steps = steps.iter().map(|step| format!("  {step}\n")).collect::<String>();
            print_text(&format!("would:\n{steps}"))
        }
    }
}

/// Prints a list.
pub(crate) fn many<T: Row>(format: Format, items: &[T]) -> Result<(), Error> {
    match format {
        Format::Table => print_text(&table(T::COLUMNS, items.iter().map(Row::cells).collect())),
        Format::Json => json(&items),
        Format::Name => print_text(&items.iter().map(|item| item.name() + "\n").collect::<String>()),
    }
}

/// Prints a document.
pub(crate) fn json<T: Serialize>(document: &T) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(document).map_err(Error::Answer)?;
    print_text(&(text + "\n"))
}

/// Prints text as it is.
pub(crate) fn print_text(text: &str) -> Result<(), Error> {
    print_bytes(text.as_bytes())
}

/// Prints bytes as they are.
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(Error::Output)
}

fn table(columns: &[&str], rows: Vec<Vec<String>>) -> String {
    let width = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count());
        cells.chain([columns[at].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(columns.to_vec());
    for row in &rows {
        text.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    text
}

/// Bytes in the largest binary unit that keeps a digit before the point.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A time of so many seconds in the unit that says enough of it.
pub(crate) fn seconds(count: u64) -> String {
    match count {
        0..120 => format!("{count} s"),
        120..7200 => format!("{} min", count.div_ceil(60)),
        _ => format!("{} h", count.div_ceil(3600)),
    }
}

/// A moment without its fraction.
pub(crate) fn time(time: Time) -> String {
    let text = time.to_string();
    match text.split_once('.') {
        Some((whole, _)) => format!("{whole}Z"),
        None => text,
    }
}

/// An enum as it stands in JSON.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        Ok(other) => other.to_string(),
        Err(_) => String::new(),
    }
}
