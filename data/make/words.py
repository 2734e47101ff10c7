"""Names, places and values, and which of them belong to which split.

Every name and every number is assigned to one split by a hash of its text, so a name drawn for the test rows can
never appear in training rows or in the pretraining corpus, whatever the seed. Months, weekdays and topic words are
shared by all splits.
"""

import hashlib
import random
from collections.abc import Sequence

FIRST_NAMES = """
Adam Agnes Ahmed Alice Amara Amir Ana Andrea Anna Anton Arthur Aisha Beatrice Ben Bianca Boris Carla Carlos Carmen
Caroline Charles Charlotte Chen Chloe Clara Claire Daniel Daria David Deepak Diana Diego Dmitri Edith Elena Elias
Elisa Elizabeth Emil Emily Emma Eric Esther Ethan Eva Fatima Felix Fiona Francis Frank Gabriel George Grace Greta
Hannah Hans Harry Hassan Helen Henry Hiroshi Hugo Ibrahim Ida Igor Ines Ingrid Irene Isaac Isabel Ivan Jack Jacob
James Jane Javier Jean Joan John Jonas Jorge Joseph Julia Julian Karen Karim Katherine Kenji Kevin Klaus Kofi Laila
Lars Laura Lea Leo Leon Li Lina Linda Lisa Louis Lucas Lucia Lucy Luis Magnus Malik Marco Margaret Maria Mark Marta
Martin Mary Matteo Max Maya Mei Michael Miguel Mina Miriam Mohammed Monica Nadia Nathan Nina Noah Nora Oliver Olga
Omar Oscar Pablo Patricia Paul Paula Pedro Peter Philip Priya Rachel Rafael Ravi Rebecca Richard Robert Rosa Ruth
Sam Samuel Sandra Sara Sarah Simon Sofia Sophie Stefan Stella Susan Sven Tara Teresa Thomas Tom Uma Valentina Vera
Victor Vincent Wei William Xavier Yara Yasmin Yuki Yusuf Zara Zoe
""".split()

LAST_NAMES = """
Abbott Adams Ahmad Ali Allen Alvarez Andersen Anderson Bailey Baker Banerjee Bauer Becker Bell Bennett Berg Bernard
Bianchi Brandt Brooks Brown Bruno Campbell Carter Castro Chang Chaudhry Clark Cohen Collins Cooper Costa Cruz Das
Davies Davis Diaz Dubois Edwards Eriksen Evans Farah Fernandez Ferrari Fischer Fisher Foster Fournier Garcia Gomez
Gonzalez Gray Green Gruber Gupta Haddad Hall Hansen Harris Hayes Hernandez Hill Hoffmann Horvath Hughes Ito Ivanov
Jackson Jansen Jensen Johansson Johnson Jones Kaya Keller Kelly Khan Kim King Klein Kovacs Kowalski Kumar Lambert
Lang Larsen Lee Lehmann Lewis Lindberg Lopez Marino Martinez Mason Mehta Mendes Meyer Miller Mitchell Moore Morales
Moreau Morgan Morris Mueller Murphy Nakamura Nelson Nguyen Nielsen Novak Okafor Olsen Ortiz Osman Palmer Park Parker
Patel Pereira Perez Petrov Phillips Popov Price Quinn Ramirez Rao Reed Reyes Richter Rivera Roberts Robinson Rojas
Romano Rossi Russo Ryan Salazar Santos Sato Schmidt Schneider Schwarz Scott Shah Sharma Silva Singh Smith Sokolov
Stewart Suzuki Svensson Tanaka Taylor Thompson Torres Turner Vargas Vogel Wagner Walker Wang Ward Watson Weber White
Williams Wilson Wolf Wood Wright Yamada Yilmaz Young Zhang Zimmermann
""".split()

CITIES = """
Aarhus;Accra;Amsterdam;Ankara;Antwerp;Athens;Auckland;Austin;Baltimore;Bangkok;Barcelona;Basel;Beirut;Belgrade;Bergen;
Berlin;Bilbao;Bogota;Bologna;Bordeaux;Boston;Bremen;Brighton;Bristol;Brussels;Budapest;Cairo;Calgary;Cape Town;
Cardiff;Chicago;Cologne;Copenhagen;Dakar;Dallas;Delhi;Denver;Detroit;Dresden;Dublin;Edinburgh;Florence;Frankfurt;
Geneva;Genoa;Ghent;Glasgow;Gothenburg;Graz;Hamburg;Hanoi;Havana;Helsinki;Houston;Istanbul;Jakarta;Karachi;Kyoto;
Lagos;Leeds;Leipzig;Lima;Lisbon;Liverpool;London;Lyon;Madrid;Malmo;Manchester;Manila;Marseille;Melbourne;Mexico City;
Miami;Milan;Montreal;Moscow;Mumbai;Munich;Nairobi;Nantes;Naples;Nice;Nuremberg;Osaka;Oslo;Ottawa;Oxford;
Palermo;Paris;Perth;Porto;Prague;Quito;Riga;Rome;Rotterdam;Salzburg;San Diego;Santiago;Seattle;Seoul;Seville;
Shanghai;Singapore;Sofia;Stockholm;Stuttgart;Sydney;Taipei;Tallinn;Tokyo;Toronto;Toulouse;Trieste;Tunis;Turin;
Utrecht;Valencia;Vancouver;Venice;Vienna;Vilnius;Warsaw;Wellington;York;Zagreb;Zurich
""".replace("\n", "").split(";")

MONTHS = ("January February March April May June July August September October November December").split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TOPICS = """
budget contract website brochure catalogue survey payroll warehouse insurance merger logo newsletter workshop audit
rent lease roof heating pension tax delivery launch prototype translation training schedule exhibition parking
archive recruitment kitchen printer server database garden elevator museum festival harvest bridge
""".split()
COMMON_WORDS = """
apple river stone paper window table cloud silver bread forest candle ladder mirror basket winter summer copper
marble button pillow engine rocket anchor bottle camera carpet castle cotton dragon feather finger flower hammer
island jacket kettle lemon magnet needle orange pencil planet pocket ribbon saddle shadow spider spring sugar temple
thunder ticket tiger tunnel turtle valley velvet violin wagon whistle wooden yellow zebra blue green red black white
small large quick slow warm cold north south east west
""".split()

SIMPLE_ONSETS = "b d f g h j k l m n p r s t v w z".split()
RARE_ONSETS = "br ch cl cr c dr fl fr gl gr kr pl pr qu sch sh sk sl sp st sv th tr tw wh x y".split()
SIMPLE_VOWELS = "aeiou"
RARE_VOWELS = "ai au ea ee ei ia ie oa oo ou ue y".split()
CODAS = "n n r r l l s t m d k b g p ck ff ll nd ng nn rd rn rt ss st th tz x z".split()
SPLIT_OF_BUCKET = ("test", "valid", "train", "train", "train", "train", "train", "train")


def split_of(text: str) -> str:
    """The split that a name or number belongs to: an eighth of all texts each for test and valid, the rest train."""
    return SPLIT_OF_BUCKET[hashlib.sha256(text.encode()).digest()[0] % len(SPLIT_OF_BUCKET)]


def invented_word(rng: random.Random) -> str:
    """A pronounceable word of three to nine letters, two or three random syllables, in lower case."""
    word = ""
    for _ in range(rng.choice((2, 2, 2, 3))):
        word += rng.choice(SIMPLE_ONSETS if rng.random() < 0.7 else RARE_ONSETS)
        word += rng.choice(SIMPLE_VOWELS if rng.random() < 0.8 else RARE_VOWELS)
    if rng.random() < 0.5:
        word += rng.choice(CODAS)
    return word[:9]


class Values:
    """Draws names and values of one split; `real` is the share of real-life names, `known` the words to draw from."""

    def __init__(self, rng: random.Random, split: str, real: float = 0.35, known: Sequence[str] = COMMON_WORDS):
        self.rng = rng
        self.split = split
        self.real = real
        self.known = known
        self._first_names = [name for name in FIRST_NAMES if split_of(name) == split]
        self._last_names = [name for name in LAST_NAMES if split_of(name) == split]
        self._cities = [name for name in CITIES if split_of(name) == split]

    def _name(self, real_names: list[str]) -> str:
        if self.rng.random() < self.real:
            return self.rng.choice(real_names)
        while True:
            name = invented_word(self.rng).capitalize()
            if len(name) > 2 and split_of(name) == self.split:
                return name

    def first_name(self) -> str:
        return self._name(self._first_names)

    def last_name(self) -> str:
        return self._name(self._last_names)

    def person(self) -> str:
        return f"{self.first_name()} {self.last_name()}"

    def city(self) -> str:
        return self._name(self._cities)

    def number(self, low: int, high: int) -> str:
        """A number of this split with low <= number < high."""
        while True:
            number = str(self.rng.randrange(low, high))
            if split_of(number) == self.split:
                return number

    def code(self) -> str:
        """Two or three capitals, a dash and a number, such as KX-4471."""
        letters = "".join(self.rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(self.rng.choice((2, 3))))
        return f"{letters}-{self.number(10, 10_000)}"

    def word(self) -> str:
        """A known word, or a third of the time an invented one."""
        return self.rng.choice(self.known) if self.rng.random() < 0.67 else invented_word(self.rng)

    def date(self) -> str:
        return f"{self.rng.randint(1, 28)} {self.rng.choice(MONTHS)}"

    def time(self) -> str:
        return f"{self.rng.randint(7, 20)}:{self.rng.choice(('00', '05', '10', '15', '20', '30', '40', '45', '50'))}"

    def weekday(self) -> str:
        return self.rng.choice(WEEKDAYS)

    def topic(self) -> str:
        return self.rng.choice(TOPICS)
